"""LaTRO: latent reasoning optimization, a likelihood reward that keeps the thoughts near a reference.

(arXiv 2411.04282.) The target y of a position is a sample of p(y | x) = Σ_c π(c | x) p(y | x, c), with the
thought c as its latent variable. The objective is the variational lower bound of log p(y | x)

    E_{c ~ π} [ log p(y | x, c) ] − β KL(π ‖ π_0)

where π_0 is the frozen initial model, or that of `reference.path`. A thought c of L tokens has the reward

    r(c) = log p(y | x, c) − β Σ_{k ≤ L} (log π(c_k) − log π_0(c_k))

in nats, its advantage is leave-one-out (RLOO). With `direct: 1` the policy gradient is the sum over the
thought's tokens; with another `direct`, `loss.reduction: auto` is their mean, and `sum` has to be set.
`direct` adds the derivative of log p(y | x, c) itself: the bound's second term, which trains the reader.

On-policy and with `direct: 1` and `loss.reader_coef: 0` the gradient has the bound's as its mean: the
log-ratio in the reward carries no gradient, and needs none, since E[∇ log π] = 0. `beta: 0` is `likelihood`
with `score: log_prob`, bit by bit, and needs no reference.

The paper has the second term; in the authors' code its weight is 0 by default. The paper's settings are
β .05, 16 thoughts of up to 200 tokens, a learning rate of 5e-7. In its code the reward of a thought that did
not end is twice the mean reward, which is a penalty as long as the mean is negative: `unclosed:
double_mean`. Our choices: the mean is that of the closed thoughts of the group, and a mean above 0 (possible
through β) is not doubled. By default `sampling.cut` decides, as for every other objective.

Pitfalls: the log-ratio is that of the distribution at `sampling.temperature`, without top-p and top-k. It
grows with the length of a thought, so β shortens thoughts as the policy moves away. Σ log p grows with the
target, and β has to grow with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from rewards import leave_one_out, target_logp
from rlpretrain.config import Amount, ConfigError, PretrainConfig
from rlpretrain.objectives import base
from rlpretrain.types import Scores
from rollout.types import FinishReason, Group


@dataclass(kw_only=True)
class Config(base.Config):
    """LaTRO's own fields."""

    beta: Amount = 0.05
    """β, weight of the KL divergence from the reference; 0 needs no reference."""
    direct: Amount = 1.0
    """Weight of the derivative of log p(target | context, thought); 0 trains thoughts only."""
    unclosed: Literal["cut", "double_mean"] = "cut"
    """Reward of a thought that did not close itself. cut: as `sampling.cut` says.
    double_mean: twice the mean reward of the group's closed thoughts, whatever `sampling.cut_penalty` is.
    """


class LaTRO(base.Objective):
    """Reward a thought by the log-probability of what follows, minus its divergence from the reference."""

    Config = Config

    def __init__(self, config: Any, tokenizer: Any):
        super().__init__(config, tokenizer)
        if config.beta:
            self.needs = self.needs | {"reference"}
        if config.direct == 1:
            self.token_reduction = "sum"

    def check_run(self, run: PretrainConfig) -> None:
        """Raise ConfigError for a rule of unclosed thoughts that `sampling.cut` leaves without effect."""
        if self.config.unclosed == "double_mean" and run.sampling.cut == "mask":
            raise ConfigError(
                "objective.unclosed double_mean has no effect with sampling.cut mask, which leaves unclosed "
                "thoughts out: set sampling.cut to force_close"
            )

    def reward(self, groups: Sequence[Group], scores: Scores) -> Tensor:
        """log p(target | context, thought) − β · log-ratio [B, G], in nats."""
        reward = target_logp(scores.target_logps, scores.target_mask)
        return reward - self.config.beta * log_ratio(scores) if self.config.beta else reward

    def advantage(self, reward: Tensor, groups: Sequence[Group]) -> Tensor:
        """Leave-one-out advantages [B, G]."""
        if self.config.unclosed == "double_mean":
            reward = double_mean(reward, groups)
        return leave_one_out(reward)

    def target_weights(self, groups: Sequence[Group], scores: Scores) -> Tensor:
        """`reader_coef` plus `direct`."""
        return super().target_weights(groups, scores) + self.config.direct


def log_ratio(scores: Scores) -> Tensor:
    """log π(c) − log π_0(c) [B, G] of whole thoughts in float64 nats, without gradient.

    Its mean over thoughts of π is the KL divergence. Raises ValueError without log-probs of the reference.
    """
    if scores.thought_reference is None:
        raise ValueError("the log-ratio of thoughts needs their log-probs under the reference")
    return (scores.thought_logps.detach().double() - scores.thought_reference.double()).sum(-1)


def double_mean(reward: Tensor, groups: Sequence[Group]) -> Tensor:
    """Rewards [B, G], with 2 · mean (or the mean, if above 0) of the group's closed thoughts for the others.

    A group without a closed thought keeps its rewards, and NaN (does not count) stays NaN.
    """
    closed = torch.zeros(reward.shape, dtype=torch.bool, device=reward.device)
    for b, group in enumerate(groups):
        for g, thought in enumerate(group.thoughts):
            closed[b, g] = thought.finish_reason is FinishReason.CLOSE
    mean = reward.masked_fill(~closed, torch.nan).nanmean(1, keepdim=True)
    replaced = ~closed & ~reward.isnan() & ~mean.isnan()
    return torch.where(replaced, torch.minimum(mean, 2 * mean), reward)


OBJECTIVE = LaTRO
