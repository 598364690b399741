"""The likelihood family: reward a thought by how likely it makes the true target, in several papers' ways.

With p the probability of the target after context and thought, p_k that of its k-th token, and T its length:

- `log_prob`: the sum of log p_k, RLP's reward without its baseline (arXiv 2602.03979 compares the family).
- `mean_log_prob`: the mean of log p_k.
- `prob`: p. VeriFree, arXiv 2505.21493.
- `mean_prob`: the mean of p_k.
- `debiased_prob`: the mean of p_k minus that without a thought, clipped to [0, 1]. RLPR, arXiv 2506.18254.
- `jepo`: log mean p over `samples` thoughts, with leave-one-out control variates. arXiv 2503.19618.
- `perplexity_gain`: 100 (1 - PPL with / PPL without the thought), or its steps. VR-CLI, arXiv 2503.22828.

The gradient of an expected likelihood has two terms: the policy gradient of the thoughts, and the derivative
of the likelihood itself, which trains the reader to predict the target after the thought. `direct` is the
weight of the second term: 1 in VeriFree and JEPO, 0 in RLP. `loss.reader_coef` is added to it, and weights
log p under every reward.

The first term is a sum over a thought's tokens, and `loss.reduction: auto` takes this sum with `direct: 1`.
On-policy and with `reader_coef: 0`, the two terms together then have the gradient of the expected score as
their mean. With another `direct`, auto takes RLP's mean, which divides only the first term by the thought's
length: that is not the gradient of an expectation.

Our choices: leave-one-out advantages for all (RLPR divides by the deviation), the score of the live model
(VR-CLI has a frozen one), `samples` below G.

Pitfalls: `prob` is 0 on long targets. Easy tokens dominate a mean of probabilities. Where answers cannot be
verified, all of them shrink thoughts to a few tokens once `direct` dominates (arXiv 2602.03979). A clipped
gain gives no signal where no thought helps yet. For prompts with answers set `data.answer_column` and
`positions: answer`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from rewards import (
    VR_CLI_STEPS,
    debiased_probability,
    leave_one_out,
    multi_sample_bound,
    perplexity_gain,
    target_logp,
    target_probability,
)
from rlpretrain.config import Amount, ConfigError, Count
from rlpretrain.objectives import base
from rlpretrain.types import Scores
from rollout.types import Group


@dataclass(kw_only=True)
class Config(base.Config):
    """The likelihood family's own fields."""

    score: Literal[
        "log_prob", "mean_log_prob", "prob", "mean_prob", "debiased_prob", "jepo", "perplexity_gain"
    ] = "log_prob"
    """What a thought earns; see the objective's documentation."""
    direct: Amount = 0.0
    """Weight of the derivative of the score by the target's own log-probs; 0 trains thoughts only."""
    samples: Count | None = None
    """jepo: the number of thoughts that share a bound; all of a group by default, 1 is log_prob."""
    steps: bool = False
    """perplexity_gain: VR-CLI's 0, .5, .9, 1 above 0, .05, 1, 2 percent, instead of the percentage."""


class Likelihood(base.Objective):
    """Reward each thought by the likelihood of the text that really follows."""

    Config = Config

    def __init__(self, config: Any, tokenizer: Any):
        super().__init__(config, tokenizer)
        if config.direct and config.score == "perplexity_gain":
            raise ConfigError(
                "objective.direct: perplexity_gain has no direct term (its scorer is frozen); set it to 0"
            )
        if config.direct == 1:
            self.token_reduction = "sum"
        if config.direct and config.score == "jepo":
            self.needs = self.needs | {"group"}  # the weights are shares of a bound over all thoughts

    def reward(self, groups: Sequence[Group], scores: Scores) -> Tensor:
        """The score [B, G]; for jepo the log-probability, from which `advantage` computes the bound."""
        logps, baseline, mask = scores.target_logps, scores.baseline_logps, scores.target_mask
        name = self.config.score
        if name in ("log_prob", "mean_log_prob", "jepo"):
            return target_logp(logps, mask, mean=name == "mean_log_prob")
        if name in ("prob", "mean_prob"):
            return target_probability(logps, mask, mean=name == "mean_prob")
        if name == "debiased_prob":
            return debiased_probability(logps, baseline, mask)
        return perplexity_gain(logps, baseline, mask, steps=VR_CLI_STEPS if self.config.steps else None)

    def advantage(self, reward: Tensor, groups: Sequence[Group]) -> Tensor:
        """Leave-one-out advantages, or what each thought adds to JEPO's bound."""
        if self.config.score == "jepo":
            return multi_sample_bound(reward, self.config.samples)[0]
        return leave_one_out(reward)

    def target_weights(self, groups: Sequence[Group], scores: Scores) -> Tensor:
        """`reader_coef` plus `direct` times the derivative of the score by each log-prob."""
        weights = super().target_weights(groups, scores)
        if not self.config.direct:
            return weights
        return weights + self.config.direct * self._slope(scores.detached()).to(weights.dtype)

    def _slope(self, scores: Scores) -> Tensor:
        """d score / d log p_k [B, G, T]; JEPO's is the thought's share of the bound."""
        if self.config.score == "jepo":
            logps = self.reward((), scores).masked_fill(~scores.counted, torch.nan)
            _, shares = multi_sample_bound(logps, self.config.samples)
            return shares.unsqueeze(-1).expand_as(scores.target_logps)
        with torch.enable_grad():
            leaf = scores.target_logps.double().requires_grad_()
            value = self.reward((), replace(scores, target_logps=leaf))
            return torch.autograd.grad(value.nansum(), leaf)[0]


OBJECTIVE = Likelihood
