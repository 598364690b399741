"""The optimizer, its learning-rate schedule, and which parameters have weight decay."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from rlpretrain.config import OptimConfig
from rlpretrain.config.plugins import find

Schedule = Callable[[int, int, OptimConfig], float]
"""(optimizer step after warm-up, number of such steps, settings) → factor on the peak learning rate."""


def constant(step: int, total: int, config: OptimConfig) -> float:
    """The peak up to the end."""
    return 1.0


def cosine(step: int, total: int, config: OptimConfig) -> float:
    """Half a cosine, from the peak to `min_lr_ratio` of it."""
    shape = 0.5 * (1 + math.cos(math.pi * min(1.0, step / total)))
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * shape


def linear(step: int, total: int, config: OptimConfig) -> float:
    """A line, from the peak to `min_lr_ratio` of it."""
    shape = 1 - min(1.0, step / total)
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * shape


SCHEDULES: dict[str, Schedule] = {"constant": constant, "cosine": cosine, "linear": linear}


def make_schedule(config: OptimConfig, total_steps: int, inner_epochs: int = 1) -> Callable[[int], float]:
    """optimizer step → factor on the peak learning rate: linear warm-up, then `optim.schedule`.

    `warmup_steps` and `total_steps` are steps of the run, each of `inner_epochs` optimizer steps. The factor
    depends on the optimizer step alone, so a run that is resumed with another length follows the schedule of
    that length. Raises ConfigError for a schedule that is neither in `SCHEDULES` nor a function that can be
    imported.
    """
    warm, total = config.warmup_steps * inner_epochs, total_steps * inner_epochs
    shape = SCHEDULES.get(config.schedule) or find(config.schedule, "optim.schedule", SCHEDULES)

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return shape(step - warm, max(1, total - warm), config)

    return factor


def find_optimizer(config: OptimConfig) -> Callable[..., torch.optim.Optimizer] | None:
    """The factory that `optim.name` names by its path; None for adamw."""
    return None if config.name == "adamw" else find(config.name, "optim.name", ["adamw"])


def make_optimizer(groups: Sequence[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer of `optim.name`: AdamW, or the result of a factory (parameter groups, settings).

    AdamW is torch's fused one, on CPUs too, where a DeepSpeed JSON may offload its state.
    The learning rate of every group is set before every step; weight decay is in the groups.
    """
    factory = find_optimizer(config)
    if factory is None:
        return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)
    return factory(groups, config)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on matrices, none on vectors (norms, biases)."""
    matrices, vectors = [], []
    for parameter in model.parameters():
        if parameter.requires_grad:
            shape = getattr(parameter, "ds_shape", parameter.shape)  # the full shape under ZeRO 3
            (matrices if len(shape) > 1 else vectors).append(parameter)
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
