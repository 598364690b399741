"""NOVER: rank the thoughts of a group by the perplexity of the true text under a proxy (arXiv 2505.16022).

A proxy model reads context, thought c and target y. Its perplexity of the target, discounted for long
thoughts, is

    log P(c) = − Σ_k log p_proxy(y_k | x, c, y_<k) / (T · N),      N = max(1, 1 + log |c|)

with T target tokens and |c| thought tokens without the close tag. The reward is

    R(c) = w_f F + F · (w_r R_r + w_e R_e)

- F, format: 1 if the thought closed itself, else 0.
- R_r, reasoning: (n − rank) / n among the n thoughts of the group with F = 1; the lowest P has rank 0.
- R_e, efficiency: the share of the other such thoughts that are both longer and of higher P.

Ranks depend on the order of the perplexities alone, so one thought that misleads cannot dominate a group, as
it does in VR-CLI's percentage. Thoughts of equal perplexity share the best of their ranks, and differences
up to `tie` count as none: rounding must not decide between two equal thoughts. Both are our choice; the
authors' code orders them as they come.

**The proxy is the model of `baseline`.** In the paper it is a copy of the policy that moves a tenth of the
way to the policy every 100 steps. `baseline: {name: ema, decay: 0.99895}` moves as far in 100 steps, in
small ones (.99895^100 = .900): this average was there, checkpoints hold it, and no step changes the rewards
at once. `self` takes the policy itself and costs no forward, `frozen` the initial model. `reference.path`
cannot move, and RPT's `proxy` reads documents without thoughts, so neither is used.

Our choices: the length in tokens of the policy; the format is the thought's alone, since no answer is
sampled; leave-one-out advantages (the paper: GRPO, `advantage: group_normalised`). Left out: the paper's KL
term (.1). Its other settings: 8 thoughts, temperature .6, clip .1 and .2, LoRA at 1e-5.

Pitfalls: under `sampling.cut: penalise` an unclosed thought loses `cut_penalty` below its 0; force_close is
the paper's. Under mask it counts nowhere, so the format teaches nothing. Ranks of a group in which nothing
helps are as large as those of one in which thinking helps much.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rewards import target_logp
from rlpretrain.config import Amount
from rlpretrain.objectives import base
from rlpretrain.types import Scores
from rollout.types import FinishReason, Group


@dataclass(kw_only=True)
class Config(base.Config):
    """NOVER's own fields."""

    format_weight: Amount = 1.0
    """w_f, weight of a closed thought."""
    reasoning_weight: Amount = 1.0
    """w_r, weight of the rank by perplexity."""
    efficiency_weight: Amount = 1.0
    """w_e, weight of the share of thoughts beaten in both length and perplexity."""
    length_discount: bool = True
    """Divide the log-perplexity by N; false compares perplexities as they are."""
    tie: Amount = 1e-4
    """Largest difference of log P (nats per token) that counts as none. Our choice, for float32."""
    advantage: base.AdvantageForm = "leave_one_out"
    """How the thoughts of a group are compared: leave_one_out, group_normalised (GRPO) or max_rl."""


class NOVER(base.Objective):
    """Reward a thought for its rank by the proxy's perplexity of the target."""

    Config = Config
    needs = frozenset({"target", "target_baseline", "group"})
    refused_baselines = frozenset({"none"})

    def reward(self, groups: Sequence[Group], scores: Scores) -> Tensor:
        """R [B, G]; NaN where the perplexity is NaN."""
        assert scores.target_baseline is not None, "the run provides what is needed"
        lengths, closed = lengths_of(groups, scores.counted)
        perplexity = -target_logp(scores.target_baseline, scores.target_mask, mean=True)
        if self.config.length_discount:
            perplexity = perplexity / (1 + lengths.clamp(min=1).log())
        valid, c = scores.counted & closed, self.config
        form = closed.double()
        reward = c.format_weight * form + c.reasoning_weight * rank_rewards(perplexity, valid, c.tie)
        reward = reward + c.efficiency_weight * efficiency(perplexity, lengths, valid, c.tie)
        return reward.masked_fill(perplexity.isnan(), torch.nan)

    def advantage(self, reward: Tensor, groups: Sequence[Group]) -> Tensor:
        """Advantages [B, G] in the form of the field `advantage`."""
        return base.ADVANTAGES[self.config.advantage](reward)


def lengths_of(groups: Sequence[Group], like: Tensor) -> tuple[Tensor, Tensor]:
    """(tokens of each thought without its close tag, float64; whether it closed itself), both [B, G]."""
    lengths = torch.zeros(like.shape, dtype=torch.float64)
    closed = torch.zeros(like.shape, dtype=torch.bool)
    for b, group in enumerate(groups):
        for g, thought in enumerate(group.thoughts):
            closed[b, g] = thought.finish_reason is FinishReason.CLOSE
            lengths[b, g] = len(thought.token_ids) - int(closed[b, g])
    return lengths.to(like.device), closed.to(like.device)


def rank_rewards(perplexity: Tensor, valid: Tensor, tie: float = 0.0) -> Tensor:
    """(n − rank) / n [B, G] in float64 among the n valid thoughts of a group, 0 for the others.

    The rank is the number of valid thoughts whose perplexity [B, G] is lower by more than `tie`. With `tie`
    0 any increasing function of the perplexity gives the same.
    """
    lower = perplexity[:, None, :] < perplexity[:, :, None] - tie  # [B, thought, other]
    rank = (lower & valid[:, None, :]).sum(-1)
    n = valid.sum(1, keepdim=True)
    return torch.where(valid, (n - rank).double() / n.clamp(min=1), 0.0)


def efficiency(perplexity: Tensor, lengths: Tensor, valid: Tensor, tie: float = 0.0) -> Tensor:
    """The share [B, G] of the other valid thoughts that are longer, and of a perplexity higher by `tie`.

    0 for thoughts that are not valid, and in a group with fewer than two that are.
    """
    worse = perplexity[:, None, :] > perplexity[:, :, None] + tie
    longer = lengths[:, None, :] > lengths[:, :, None]
    beaten = (worse & longer & valid[:, None, :]).sum(-1)
    others = (valid.sum(1, keepdim=True) - 1).clamp(min=1)
    return torch.where(valid, beaten.double() / others, 0.0)


OBJECTIVE = NOVER
