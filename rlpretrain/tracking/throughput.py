"""Tokens and operations a second of a step, and their share of what the devices can do (MFU)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StepWork:
    """The work of one step, over all ranks; rlpretrain/models/spending.py defines what is counted."""

    trained_tokens: float = 0.0
    """Tokens that went through the policy with gradient, in every inner epoch."""
    operations: float = 0.0
    """Operations of all models and engines."""
    on_ranks: float = 0.0
    """Those that the ranks' own devices did: without engines in other processes."""
    in_training: float = 0.0
    """Those of scoring and updating: without sampling, and without what positions and rewards need."""


def throughput(
    work: StepWork, step_s: float, train_s: float, ranks: int, peak: float | None
) -> dict[str, float]:
    """The metrics of a step that took `step_s` seconds, `train_s` of them for scoring and updating.

    `peak` is the most operations a second of one device; without it there is no MFU.
    """
    metrics = {
        "perf/tokens_per_s": work.trained_tokens / step_s,
        "perf/flops_per_s": work.operations / step_s,
    }
    if peak is not None:
        metrics["perf/mfu"] = work.in_training / train_s / (ranks * peak)
        metrics["perf/step_mfu"] = work.on_ranks / step_s / (ranks * peak)
    return metrics
