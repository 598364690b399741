"""The loop: take a batch, score it, reward the thoughts, update the policy. Everything else is called from here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rlpretrain.config import ConfigError
from rlpretrain.losses import clipped_surrogate, ntp_loss, target_loss
from rlpretrain.packing import joined
from rlpretrain.types import MicroBatch, Scores
from rollout.types import Group

Judgement = tuple[Tensor, Tensor, Tensor | None]
"""Rewards [B, G], advantages [B, G], and old log-probs [B, G, L] (None: those of the forward that trains)."""


def judge(objective: Any, micro: MicroBatch, scores: Scores) -> Judgement:
    """Rewards and advantages of one micro-batch, without gradient. Thoughts that do not count have reward NaN, advantage 0."""
    reward = rewards_of(objective, micro, scores)
    return reward, objective.advantage(reward, micro.groups).float(), None


def judge_first(run: Any, micros: Sequence[MicroBatch]) -> list[Judgement]:
    """Judge a whole batch before any update: for several inner epochs, for objectives that compare groups, and where a group is
    spread over micro-batches."""
    with torch.no_grad():
        scored = [run.baseline(run.policy.score(micro), micro) for micro in micros]
    rewards = [rewards_of(run.objective, m.to(s.counted.device), s) for m, s in zip(micros, scored, strict=True)]
    whole: dict[str, Group] = {}
    rows: dict[str, Tensor] = {}
    for micro, reward in zip(micros, rewards, strict=True):
        for group, row in zip(micro.groups, reward, strict=True):
            before, row = whole.get(group.id), row[: len(group.thoughts)]
            whole[group.id] = group if before is None else joined(before, group)
            rows[group.id] = row if before is None else torch.cat([rows[group.id], row])
    advantages = [torch.zeros_like(r, dtype=torch.float32) for r in rewards]
    if whole:
        matrix = pad_sequence(list(rows.values()), batch_first=True, padding_value=math.nan)
        found = dict(zip(whole, run.objective.advantage(matrix, list(whole.values())).float(), strict=True))
        for micro, advantage in zip(micros, advantages, strict=True):
            for b, (group, first) in enumerate(zip(micro.groups, micro.offsets, strict=True)):
                advantage[b, : len(group.thoughts)] = found[group.id][first : first + len(group.thoughts)]
    return [(r, a, s.thought_logps) for r, a, s in zip(rewards, advantages, scored, strict=True)]


def rewards_of(objective: Any, micro: MicroBatch, scores: Scores) -> Tensor:
    """Rewards [B, G], less what the cut-off policy takes; NaN where a thought does not count."""
    reward = objective.reward(micro.groups, scores.detached()) - micro.penalty
    return reward.masked_fill(~micro.counted, math.nan)


def train(run: Any) -> None:
    """Train until the run says stop. `run` is rlpretrain.run.Run."""
    config, objective, policy = run.config.loss, run.objective, run.policy
    ntp_coef = config.ntp_coef if objective.has_positions else 1.0
    for step in run.remaining_steps():
        batch = run.take()  # thoughts sampled under the present weights
        total = run.count(batch)  # global denominators, one all-reduce
        micros = run.pack(batch, total)  # a group straddles two only if it fits into none; as many on every rank
        if run.spread and "group" in objective.needs:
            raise ConfigError("a group is larger than token_budget, and this objective's loss needs all of its thoughts at once: "
                              f"raise token_budget ({run.config.token_budget})")  # fmt: skip
        first = objective.has_positions and (config.inner_epochs > 1 or "batch" in objective.needs or run.spread)
        judged = judge_first(run, micros) if first else [None] * len(micros)
        for _ in range(config.inner_epochs):
            for micro, known in zip(micros, judged, strict=True):
                micro = micro.to(run.ranks.device)
                own = policy.score(micro)  # one forward: thoughts, targets, trunk
                scores = run.baseline(own, micro)
                loss = ntp_coef * ntp_loss(scores, objective.ntp_weights(micro, scores)) / max(total.trunk, 1)
                reward = None
                if micro.groups:
                    reward, advantage, old = known or judge(objective, micro, scores)
                    surrogate, info = clipped_surrogate(scores, micro, advantage, config, old)
                    direct = target_loss(scores, objective.target_weights(micro.groups, scores))
                    loss = loss + (config.policy_coef * surrogate + direct) / max(total.thoughts, 1)
                    run.note(policy_loss=surrogate.detach() / max(total.thoughts, 1) / config.inner_epochs, **info)
                if run.not_finite(loss, scores, micro):
                    break
                policy.backward(loss)
                run.observe(micro, scores, loss / config.inner_epochs, reward, own.baseline_logps)  # logged is the epochs' mean
            run.update()  # optimizer step, then the baseline's
        run.sync(version=step + 1)
        run.finish(step + 1, batch)  # log, evaluate, checkpoint, decide whether to go on
