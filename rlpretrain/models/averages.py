"""Averages of weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


@torch.no_grad()
def move_towards(averages: Mapping[str, Tensor], weights: Iterable[tuple[str, Tensor]], share: float) -> None:
    """Set each average to average + share * (weight - average), in float32.

    An average under several names, as those of a tied tensor, moves once.
    """
    moved: set[int] = set()
    for name, weight in weights:
        average = averages[name]
        if id(average) not in moved:
            moved.add(id(average))
            average.lerp_(weight.to(average.device, torch.float32), share)
