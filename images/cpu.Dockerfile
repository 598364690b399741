# The environment of `make demo` on a CPU, from the committed lock. From the top of a checkout:
#   docker build -f images/cpu.Dockerfile -t rlpretrain .
#   docker run --rm -v "$PWD/runs:/rlpretrain/runs" rlpretrain train examples/dial_rlp.yaml --dry-run
#   docker run --rm --entrypoint make rlpretrain demo
# Never built. tests/test_images.py checks what it can.
FROM python:3.11-slim
RUN apt-get update && apt-get install -y --no-install-recommends make && rm -rf /var/lib/apt/lists/*
WORKDIR /rlpretrain
COPY . .
RUN bash scripts/setup.sh demo-cpu
ENV PATH=/rlpretrain/.venv/bin:$PATH DS_ACCELERATOR=cpu TOKENIZERS_PARALLELISM=false
ENTRYPOINT ["rlpretrain"]
CMD ["--help"]
