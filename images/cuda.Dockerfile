# A GPU with vLLM, DeepSpeed, TRL and adapters. The wheels bring CUDA's libraries; the machine needs a driver for CUDA 13
# and the NVIDIA container toolkit. From the top of a checkout:
#   docker build -f images/cuda.Dockerfile -t rlpretrain-cuda .
#   docker run --rm --gpus all --ipc host -v "$PWD:/data" -w /data rlpretrain-cuda train rlp.yaml --dry-run
# Never built or run. tests/test_images.py checks what it can.
FROM python:3.12-slim
# Triton and DeepSpeed compile at run time
RUN apt-get update && apt-get install -y --no-install-recommends gcc g++ git make && rm -rf /var/lib/apt/lists/*
WORKDIR /rlpretrain
COPY . .
RUN pip install --no-cache-dir ".[vllm,deepspeed,trl,peft,qlora,ray,serve,server,eval,plot,tensorboard]"
ENV TOKENIZERS_PARALLELISM=false
ENTRYPOINT ["rlpretrain"]
CMD ["--help"]
