"""Measurements that tests do not make: `python -m benchmarks.NAME --json`; README.md has the results."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed prints a warning on stdout
