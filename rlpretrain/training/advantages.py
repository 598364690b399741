"""Rewards and advantages of thoughts, for one micro-batch or for a whole step at once.

Legend: B positions, G thoughts, L thought tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rlpretrain.objectives.base import Objective
from rlpretrain.scoring.groups import compute_rewards, rows_by_group, whole_groups
from rlpretrain.types import MicroBatch, Scores
from rollout.types import Group

if TYPE_CHECKING:
    from rlpretrain.training.run import Run


@dataclass(frozen=True, slots=True)
class Advantages:
    """Rewards and advantages of the thoughts of one micro-batch, without gradient."""

    rewards: Tensor  # [B, G], NaN where a thought does not count
    advantages: Tensor  # [B, G] float32, 0 where a thought does not count
    old_logps: Tensor | None = None
    """[B, G, L] Old log-probs of the ratio; None: those of the forward that trains."""


def compute_advantages(objective: Objective, micro: MicroBatch, scores: Scores) -> Advantages:
    """Rewards and advantages of one micro-batch, from the forward that trains it."""
    rewards = compute_rewards(objective, micro, scores)
    return Advantages(rewards, objective.advantage(rewards, micro.groups).float())


@torch.no_grad()
def compute_step_advantages(run: Run, micros: Sequence[MicroBatch]) -> list[Advantages]:
    """Rewards, advantages and old log-probs of a whole step, before any update.

    Used with several inner epochs, for objectives that compare groups, and where a group is split over
    micro-batches.
    """
    scored = [run.add_references(run.policy.score(micro), micro) for micro in micros]
    rewards = []
    for micro, scores in zip(micros, scored, strict=True):
        on_device = micro.to(scores.counted.device)
        reward = compute_rewards(run.objective, on_device, scores)
        rewards.append(mark_broken(reward, on_device, scores))
    groups, rows = whole_groups(micros), rows_by_group(micros, rewards)
    if "batch" in run.objective.needs:
        groups, rows = _of_all_ranks(run, groups, rows)
    advantages = [torch.zeros_like(r, dtype=torch.float32) for r in rewards]
    if groups:
        matrix = pad_sequence([rows[id_] for id_ in groups], batch_first=True, padding_value=math.nan)
        by_group = run.objective.advantage(matrix, list(groups.values())).float()
        advantage_of = dict(zip(groups, by_group, strict=True))
        for micro, advantage in zip(micros, advantages, strict=True):
            for b, (group, first) in enumerate(zip(micro.groups, micro.offsets, strict=True)):
                size = len(group.thoughts)
                advantage[b, :size] = advantage_of[group.id][first : first + size]
    return [Advantages(r, a, s.thought_logps) for r, a, s in zip(rewards, advantages, scored, strict=True)]


def _of_all_ranks(
    run: Run, groups: Mapping[str, Group], rows: Mapping[str, Tensor]
) -> tuple[dict[str, Group], dict[str, Tensor]]:
    """{group id: group} and {group id: rewards [G]} of the whole step, the same on every rank."""
    parts = run.ranks.gather([(group, rows[id_].cpu()) for id_, group in groups.items()])
    step = {group.id: (group, rewards.to(run.ranks.device)) for part in parts for group, rewards in part}
    return {id_: step[id_][0] for id_ in sorted(step)}, {id_: step[id_][1] for id_ in sorted(step)}


def mark_broken(rewards: Tensor, micro: MicroBatch, scores: Scores) -> Tensor:
    """Rewards with inf in place of a NaN that non-finite log-probs caused.

    With inf the whole step is skipped; a NaN would only leave out the thought.
    """
    thoughts_finite = torch.isfinite(scores.thought_logps).all(-1)
    targets_finite = torch.isfinite(scores.target_logps).all(-1)
    baselines_finite = torch.isfinite(scores.baseline_logps[:, None]).all(-1)
    all_finite = thoughts_finite & targets_finite & baselines_finite
    if scores.thought_reference is not None:
        all_finite = all_finite & torch.isfinite(scores.thought_reference).all(-1)
    if scores.target_baseline is not None:
        all_finite = all_finite & torch.isfinite(scores.target_baseline).all(-1)
    broken = rewards.isnan() & micro.counted & ~all_finite
    return rewards.masked_fill(broken, math.inf)


def leave_out_unrewarded(
    run: Run, micros: Sequence[MicroBatch], rewards: Sequence[Tensor]
) -> list[MicroBatch]:
    """The micro-batches of a step without the thoughts whose reward [B, G] is NaN. All ranks call it.

    The result of `reward()` is known only after scoring; `count` has already left out thoughts with a stored
    NaN.
    """
    out = []
    for micro, reward in zip(micros, rewards, strict=True):
        counted = micro.counted & ~reward.isnan().to(micro.counted.device)
        out.append(replace(micro, counted=counted, thought_mask=micro.thought_mask & counted[..., None]))
    if run.layout.reduction != "token_mean":
        return out
    local_totals = [
        float(sum(micro.counted.sum() for micro in micros)),
        float(sum(micro.counted.sum() for micro in out)),
        float(sum(micro.thought_mask.sum() for micro in micros)),
        float(sum(micro.thought_mask.sum() for micro in out)),
    ]
    thoughts, fewer_thoughts, tokens, fewer_tokens = run.ranks.sum(local_totals)
    if not fewer_tokens:
        return out
    scale = (fewer_thoughts / fewer_tokens) / (thoughts / max(tokens, 1))
    return [replace(micro, token_weights=micro.token_weights * scale) for micro in out]


def has_uncounted(micro: MicroBatch, known: Advantages | None) -> bool:
    """Whether the denominators count a thought of this micro-batch whose live reward is NaN."""
    return known is not None and bool((known.rewards.isnan() & micro.counted).any())
