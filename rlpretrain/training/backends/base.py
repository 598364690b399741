"""What every backend of a policy has in common."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StepInfo:
    """What an optimizer step did."""

    grad_norm: float
    lr: float
    applied: bool
