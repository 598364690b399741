"""What thoughts earn and what follows for them: rewards and advantages, of a micro-batch or of a whole step
at once.

Legend: B positions, G thoughts, L thought tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rlpretrain.objectives.base import Objective
from rlpretrain.scoring.groups import compute_rewards, rows_by_group, whole_groups
from rlpretrain.types import MicroBatch, Scores

if TYPE_CHECKING:
    from rlpretrain.training.run import Run


@dataclass(frozen=True, slots=True)
class Advantages:
    """What the thoughts of one micro-batch earn, and what follows for them; no gradient."""

    rewards: Tensor  # [B, G], NaN where a thought does not count
    advantages: Tensor  # [B, G] float32, 0 where a thought does not count
    old_logps: Tensor | None = (
        None  # [B, G, L] that the ratio is taken against; None: those of the forward that trains
    )


def compute_advantages(objective: Objective, micro: MicroBatch, scores: Scores) -> Advantages:
    """Rewards and advantages of one micro-batch, from the forward that trains it."""
    rewards = compute_rewards(objective, micro, scores)
    return Advantages(rewards, objective.advantage(rewards, micro.groups).float())


@torch.no_grad()
def compute_step_advantages(run: Run, micros: Sequence[MicroBatch]) -> list[Advantages]:
    """Rewards, advantages and old log-probs of a whole step, before any update.

    For several inner epochs, for objectives that compare groups, and where a group is split over
    micro-batches.
    """
    scored = [run.add_references(run.policy.score(micro), micro) for micro in micros]
    rewards = []
    for micro, scores in zip(micros, scored, strict=True):
        here = micro.to(scores.counted.device)
        rewards.append(mark_broken(compute_rewards(run.objective, here, scores), here, scores))
    groups, rows = whole_groups(micros), rows_by_group(micros, rewards)
    advantages = [torch.zeros_like(r, dtype=torch.float32) for r in rewards]
    if groups:
        matrix = pad_sequence([rows[id_] for id_ in groups], batch_first=True, padding_value=math.nan)
        found = dict(zip(groups, run.objective.advantage(matrix, list(groups.values())).float(), strict=True))
        for micro, advantage in zip(micros, advantages, strict=True):
            for b, (group, first) in enumerate(zip(micro.groups, micro.offsets, strict=True)):
                advantage[b, : len(group.thoughts)] = found[group.id][first : first + len(group.thoughts)]
    return [Advantages(r, a, s.thought_logps) for r, a, s in zip(rewards, advantages, scored, strict=True)]


def mark_broken(rewards: Tensor, micro: MicroBatch, scores: Scores) -> Tensor:
    """Rewards with inf for a NaN that comes of broken log-probs: the step is to be skipped, not quietly
    made smaller.
    """
    logps = (scores.thought_logps, scores.target_logps, scores.baseline_logps[:, None])
    fine = [torch.isfinite(x).all(-1) for x in logps]
    broken = rewards.isnan() & micro.counted & ~(fine[0] & fine[1] & fine[2])
    return rewards.masked_fill(broken, math.inf)


def leave_out_unrewarded(
    run: Run, micros: Sequence[MicroBatch], rewards: Sequence[Tensor]
) -> list[MicroBatch]:
    """The micro-batches of a step without the thoughts whose reward [B, G] is NaN; all ranks call it.

    What `reward()` says of a thought is known only after scoring; `count` has left out those with a stored
    NaN.
    """
    out = []
    for micro, reward in zip(micros, rewards, strict=True):
        counted = micro.counted & ~reward.isnan().to(micro.counted.device)
        out.append(replace(micro, counted=counted, thought_mask=micro.thought_mask & counted[..., None]))
    if run.layout.reduction != "token_mean":
        return out
    sums = [float(sum(m.counted.sum() for m in part)) for part in (micros, out)]
    sums += [float(sum(m.thought_mask.sum() for m in part)) for part in (micros, out)]
    thoughts, fewer_thoughts, tokens, fewer_tokens = run.ranks.sum(sums)
    if not fewer_tokens:
        return out
    scale = (fewer_thoughts / fewer_tokens) / (thoughts / max(tokens, 1))
    return [replace(micro, token_weights=micro.token_weights * scale) for micro in out]


def has_uncounted(micro: MicroBatch, known: Advantages | None) -> bool:
    """Whether the denominators count a thought of this micro-batch whose live reward is NaN."""
    return known is not None and bool((known.rewards.isnan() & micro.counted).any())
