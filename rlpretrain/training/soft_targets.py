"""What an objective does before a step is scored: it may use the trained model, and gives soft targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from rewards.tiled_logps import IGNORE
from rlpretrain.objectives.base import Objective
from rlpretrain.scoring.teacher import Teacher
from rlpretrain.types import MicroBatch

if TYPE_CHECKING:
    from rlpretrain.training.run import Run


def add_soft_targets(run: Run, micros: Sequence[MicroBatch]) -> list[MicroBatch]:
    """The micro-batches with the objective's soft targets where it has some. All ranks call it.

    Before that, `before_step` may use the trained model. A step with several inner epochs keeps the targets
    of its first. They wait on the CPU: [M, K] numbers, never [M, vocabulary]. Raises ValueError for soft
    targets that do not fit the document tokens.
    """
    if run.learner is not None:
        for name, value in run.objective.before_step(run.learner, micros).items():
            run.metrics.add(name, value)
    if getattr(run.objective.soft_targets, "__func__", None) is Objective.soft_targets:
        return list(micros)
    teacher = None
    if "teacher" in run.objective.needs and run.reference is not None:
        teacher = Teacher(run.reference)
    out = [_with_soft_targets(run, micro, teacher) for micro in micros]
    for micro in out:
        run.metrics.add("ntp/soft_frac", float(micro.soft_ids is not None), len(micro.trunk_labels))
    return out


@torch.no_grad()
def _with_soft_targets(run: Run, micro: MicroBatch, teacher: Teacher | None) -> MicroBatch:
    soft = run.objective.soft_targets(micro, teacher)
    if soft is None:
        return micro
    tokens, name = len(micro.trunk_labels), type(run.objective).__name__
    if soft.ids.ndim != 2 or soft.ids.shape != soft.probs.shape or len(soft.ids) != tokens:
        raise ValueError(
            f"{name}.soft_targets gave ids {tuple(soft.ids.shape)} and probs {tuple(soft.probs.shape)}: both "
            f"must be [{tokens}, K], a row for each document token of the micro-batch"
        )
    probs = soft.probs.float().cpu()
    if not bool((probs.isfinite() & (probs >= 0)).all()):
        raise ValueError(f"{name}.soft_targets gave probs that are negative, NaN or infinite")
    ids = soft.ids.cpu().masked_fill(probs == 0, IGNORE)
    return replace(micro, soft_ids=ids, soft_probs=probs)
