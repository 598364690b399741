"""What thoughts earn and what follows for them: rewards and advantages, of a micro-batch or of a whole step at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rlpretrain.ranks import Ranks
from rlpretrain.scoring.groups import compute_rewards, rows_by_group, whole_groups
from rlpretrain.scoring.packing import Layout, token_mean
from rlpretrain.types import MicroBatch, Scores, Totals

Judgement = tuple[Tensor, Tensor, Tensor | None]
"""Rewards [B, G], advantages [B, G], and old log-probs [B, G, L] (None: those of the forward that trains)."""


def judge(objective: Any, micro: MicroBatch, scores: Scores) -> Judgement:
    """Rewards and advantages of one micro-batch, without gradient. Thoughts that do not count have reward NaN, advantage 0."""
    reward = compute_rewards(objective, micro, scores)
    return reward, objective.advantage(reward, micro.groups).float(), None


def judge_first(run: Any, micros: Sequence[MicroBatch]) -> list[Judgement]:
    """Judge a whole batch before any update: for several inner epochs, for objectives that compare groups, and where a group is
    spread over micro-batches."""
    with torch.no_grad():
        scored = [run.baseline(run.policy.score(micro), micro) for micro in micros]
    rewards = []
    for micro, scores in zip(micros, scored, strict=True):
        here = micro.to(scores.counted.device)
        rewards.append(visible(compute_rewards(run.objective, here, scores), here, scores))
    groups, rows = whole_groups(micros), rows_by_group(micros, rewards)
    advantages = [torch.zeros_like(r, dtype=torch.float32) for r in rewards]
    if groups:
        matrix = pad_sequence([rows[id_] for id_ in groups], batch_first=True, padding_value=math.nan)
        found = dict(zip(groups, run.objective.advantage(matrix, list(groups.values())).float(), strict=True))
        for micro, advantage in zip(micros, advantages, strict=True):
            for b, (group, first) in enumerate(zip(micro.groups, micro.offsets, strict=True)):
                advantage[b, : len(group.thoughts)] = found[group.id][first : first + len(group.thoughts)]
    return [(r, a, s.thought_logps) for r, a, s in zip(rewards, advantages, scored, strict=True)]


def visible(reward: Tensor, micro: MicroBatch, scores: Scores) -> Tensor:
    """Rewards with inf for a NaN that comes of broken log-probs: the step is to be skipped, not quietly made smaller."""
    fine = [torch.isfinite(x).all(-1) for x in (scores.thought_logps, scores.target_logps, scores.baseline_logps[:, None])]
    broken = reward.isnan() & micro.counted & ~(fine[0] & fine[1] & fine[2])
    return reward.masked_fill(broken, math.inf)


def leave_out(micros: Sequence[MicroBatch], rewards: Sequence[torch.Tensor], layout: Layout, totals: Totals,
              ranks: Ranks) -> tuple[list[MicroBatch], Totals]:  # fmt: skip
    """The micro-batches and denominators of a step without the thoughts whose reward [B, G] is NaN; all ranks call it.

    What `reward()` says of a thought is known only after scoring; `count` has left out those with a stored NaN.
    """
    out = []
    for micro, reward in zip(micros, rewards, strict=True):
        counted = micro.counted & ~reward.isnan().to(micro.counted.device)
        out.append(replace(micro, counted=counted, thought_mask=micro.thought_mask & counted[..., None]))
    here = [float(sum(m.counted.sum() for m in out)), float(sum(m.thought_mask.sum() for m in out))]
    found = replace(totals, **dict(zip(("thoughts", "thought_tokens"), ranks.sum(here), strict=True)))
    if layout.reduction == "token_mean" and found.thought_tokens:
        scale = token_mean(found) / token_mean(totals)
        out = [replace(micro, token_weights=micro.token_weights * scale) for micro in out]
    return out, found


def judge_all(run: Any, micros: Sequence[MicroBatch], total: Totals) -> tuple[list[MicroBatch], Totals, list[Judgement]]:
    """Judge a whole step first; the thoughts whose reward is NaN are left out of its micro-batches and denominators."""
    judged = judge_first(run, micros)
    micros, total = leave_out(micros, [reward for reward, *_ in judged], run.layout, total, run.ranks)
    return micros, total, judged


def miscounted(run: Any, micro: MicroBatch, reward: Tensor | None) -> bool:
    """Whether the live reward of a thought that the denominators count is NaN, on any rank. All ranks call it."""
    found = reward is not None and bool((reward.isnan() & micro.counted).any())
    return bool(run.ranks.max([float(found)])[0])
