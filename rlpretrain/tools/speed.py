"""The measured speed of this machine, and the time of a training step at that speed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from rlpretrain.config import PretrainConfig
from rlpretrain.tools.memory import Sizes


@dataclass(frozen=True, slots=True)
class Speed:
    """What this machine was measured to do."""

    flops: float
    """Floating-point operations a second in a matrix product."""
    bandwidth: float
    """Bytes a second read by a product with one vector."""


def measure_speed(device: str, dtype: torch.dtype) -> Speed:
    """Time a product of matrices, and one of matrices and a vector, in about half a second."""
    size = 4096 if device.startswith("cuda") else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    vector = torch.randn(size, device=device, dtype=dtype)
    many = torch.randn(8, size, size, device=device, dtype=dtype)  # more than a cache holds
    flops = 2 * size**3 / _time(lambda: a @ b, device)
    return Speed(flops, many.numel() * many.element_size() / _time(lambda: many @ vector, device))


def _time(work: Callable[[], object], device: str, times: int = 3) -> float:
    """Seconds of the fastest of several runs, after one that warms up."""
    work()
    best = float("inf")
    for _ in range(times):
        _synchronize(device)
        begin = time.perf_counter()
        work()
        _synchronize(device)
        best = min(best, time.perf_counter() - begin)
    return best


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):  # never run: docs/gpu.md
        torch.cuda.synchronize()


def time_of_step(
    config: PretrainConfig, sizes: Sizes, speed: Speed, trained: int, thoughts: int, sampled: int
) -> float:
    """Rough seconds of a step of one rank, which trains on `trained` tokens and samples `sampled` tokens.

    A parameter costs 6 operations for each trained token, 8 with gradient checkpointing, and 2 for each
    token that is sampled or read. Sampling also reads all weights for every token of a batch of thoughts,
    which bounds its time from below. Few matrices of a model are as large as the measured ones: half of
    the measured speed is assumed.
    """
    rate, parameters = speed.flops / 2, sizes.parameters
    operations = 8 if config.model.gradient_checkpointing else 6
    train = operations * parameters * trained * config.loss.inner_epochs / rate
    if not thoughts or not config.engine.in_process:
        return train
    batches = -(-thoughts // config.engine.batch_size)
    groups = -(-thoughts // config.sampling.thoughts)
    read_prompts = 2 * parameters * sizes.prompt * groups / rate
    weight_bytes = parameters * getattr(torch, config.model.dtype).itemsize
    read_weights = batches * (sampled // thoughts) * weight_bytes / speed.bandwidth
    return train + read_prompts + max(2 * parameters * sampled / rate, read_weights)


def format_duration(seconds: float) -> str:
    """A duration in its largest unit of which there are at least two."""
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.2g} seconds"
