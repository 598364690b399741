"""The learning rate of each optimizer step, and what is decayed."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from rlpretrain.config import OptimConfig


def schedule(config: OptimConfig, total_steps: int, inner_epochs: int = 1):
    """optimizer step → factor on the peak learning rate: linear warm-up, then constant, cosine or linear to `min_lr_ratio`.

    `warmup_steps` and `total_steps` are steps of the run, each of `inner_epochs` optimizer steps. The factor depends on the
    optimizer step alone, so a run that is resumed with another length follows the schedule of that length.
    """
    warm, total = config.warmup_steps * inner_epochs, total_steps * inner_epochs

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        if config.schedule == "constant":
            return 1.0
        done = min(1.0, (step - warm) / max(1, total - warm))
        shape = 0.5 * (1 + math.cos(math.pi * done)) if config.schedule == "cosine" else 1 - done
        return config.min_lr_ratio + (1 - config.min_lr_ratio) * shape

    return factor


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on matrices, none on vectors (norms, biases)."""
    trained = [p for p in model.parameters() if p.requires_grad]
    shape = [getattr(p, "ds_shape", p.shape) for p in trained]
    matrices = [p for p, s in zip(trained, shape, strict=True) if len(s) > 1]
    vectors = [p for p, s in zip(trained, shape, strict=True) if len(s) <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [g for g in groups if g["params"]]
