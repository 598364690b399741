"""Measurements that tests do not take: `python -m benchmarks.NAME --json`; README.md says what came out."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed says on stdout that it found no other
