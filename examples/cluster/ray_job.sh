#!/usr/bin/env bash
# The recipe as a job of a Ray cluster: the trainer has 8 GPUs of one node, engines are actors on others.
#   RAY_API_SERVER_ADDRESS=http://HEAD:8265 bash examples/cluster/ray_job.sh
# Checked by a test (bash -n, and the train command with --dry-run); never run: it needs GPUs.
set -euo pipefail
cd "$(dirname "$0")/../.."
ray job submit --working-dir . --entrypoint-num-gpus 8 -- torchrun --standalone --nproc-per-node 8 \
    -m rlpretrain.cli train examples/cluster/qwen3_1p7b.yaml \
    --policy '{backend: fsdp}' --resume auto --output_dir /shared/runs/qwen3_1p7b_ray
