"""The loop: take a batch, score it, reward the thoughts, update the policy. Everything else is called from here."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

from rlpretrain.config import ConfigError
from rlpretrain.training.advantages import Judgement, judge, judge_all, judge_first, miscounted
from rlpretrain.training.losses import clipped_surrogate, ntp_loss, target_loss
from rlpretrain.types import MicroBatch, Totals

__all__ = ["judge", "judge_first", "train"]


def train(run: Any) -> None:
    """Train until the run says stop. `run` is rlpretrain.training.run.Run."""
    config, objective = run.config.loss, run.objective
    for step in run.remaining_steps():
        batch = run.take()  # thoughts sampled under the present weights
        total = run.count(batch)  # global denominators, one all-reduce
        micros = run.pack(batch, total)  # a group straddles two only if it fits into none; as many on every rank
        if run.has_split_groups and "group" in objective.needs:
            raise ConfigError("a group is larger than token_budget, and this objective's loss needs all of its thoughts at once: "
                              f"raise token_budget ({run.config.token_budget})")  # fmt: skip
        noted, judged = deepcopy(run.metrics), None
        first = config.inner_epochs > 1 or "batch" in objective.needs or run.has_split_groups
        if first and objective.has_positions:
            micros, total, judged = judge_all(run, micros, total)
        for _ in range(config.inner_epochs):
            if not add_gradients(run, micros, total, judged):  # a reward of NaN was counted
                run.policy.discard()
                run.metrics = noted
                micros, total, judged = judge_all(run, micros, total)
                add_gradients(run, micros, total, judged)
            run.update()  # optimizer step, then the baseline's
        run.sync(version=step + 1)
        run.finish(step + 1, batch)  # log, evaluate, checkpoint, decide whether to go on


def add_gradients(run: Any, micros: Sequence[MicroBatch], total: Totals, judged: Sequence[Judgement] | None) -> bool:
    """Add up the step's gradient. False, and what there is must be dropped, where a live reward is NaN and `total` counts it."""
    config, objective, policy = run.config.loss, run.objective, run.policy
    ntp_coef = config.ntp_coef if objective.has_positions else 1.0
    for micro, known in zip(micros, judged or [None] * len(micros), strict=True):
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
        if run.not_finite(loss, scores, micro):
            break
        if judged is None and miscounted(run, micro, reward):
            return False
        if micro.groups:
            run.note(policy_loss=surrogate.detach() / max(total.thoughts, 1) / config.inner_epochs, **info)
        policy.backward(loss)
        run.observe(micro, scores, loss / config.inner_epochs, reward, own.baseline_logps)  # logged is the epochs' mean
    return True
