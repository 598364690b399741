"""Quiet-STaR without its mixing head: short thoughts of one length, rewarded by the next few tokens.

(arXiv 2403.09629.) At many positions of a text the model writes a thought of exactly
`sampling.max_thought_tokens` tokens; then the close tag is inserted and the next four tokens are predicted.
A thought earns what it gains on them,

    r(c) = Σ_k log p(x_{t+k} | x_<t+k, c) − Σ_k log p(x_{t+k} | x_<t+k),   A(c) = max(0, r(c) − mean r),

where the mean is over the G thoughts of the position. An advantage below 0 is set to 0: a thought that hurts
is not made less likely. The likelihood of the four tokens after the thought is trained too: that is
`loss.reader_coef`, and the text itself is `loss.ntp_coef`. Both are 1 in the authors' code.

**What is missing**: the paper predicts from an interpolation of the states with and without the thought,
whose weight is learnt by a small head. Here the prediction after a thought is the model's own, as in RLP. So
a thought that hurts hurts the whole prediction, and early training is harder than in the paper. Also left
out: thoughts sampled in parallel after every token in one forward (here each has a row or a branch), the
Gumbel straight-through estimator, the policy loss at temperature 3 with weight 1e6, and tags that start as
the embedding of a dash. The code's settings: 12 thought tokens, horizon 4, 2 thoughts, learning rate 1e-6.

With `clamp: false` and `advantage: leave_one_out` this is RLP at `target_length: 4` on the same thoughts,
bit by bit; `fixed_length: false` also samples the thoughts as RLP does.

Pitfalls: with G = 2 and the clamp only the better thought of a pair is trained, and always with an advantage
of half the difference. The advantages of a group no longer sum to 0, so they also raise the likelihood of
whatever was sampled. A sampled close tag does not end a thought of fixed length. An end-of-text token does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from rewards import leave_one_out
from rlpretrain.config import ConfigError, PretrainConfig
from rlpretrain.objectives import rlp
from rollout.types import Group, Position, Prompt


@dataclass(kw_only=True)
class Config(rlp.Config):
    """Quiet-STaR's own fields, and RLP's."""

    positions: str = "every_k"
    """As for every objective; every_k with `every: 1` may think before each token, as the paper does."""
    every: int = 1
    """Stride of positions `every_k`; `positions_per_document` are drawn among them."""
    target_length: int = 4
    """Tokens predicted after the thought."""
    clamp: bool = True
    """Set negative advantages to 0; false keeps them."""
    advantage: Literal["group_mean", "leave_one_out"] = "group_mean"
    """group_mean: reward minus the mean of all thoughts of the position. leave_one_out: of the others."""
    fixed_length: bool = True
    """Thoughts have exactly `sampling.max_thought_tokens` tokens; false: they end with the close tag."""


class QuietSTaR(rlp.RLP):
    """Reward thoughts of one length by their gain on the next tokens, where it is above their mean."""

    Config = Config

    def check_run(self, run: PretrainConfig) -> None:
        """Raise ConfigError for thoughts of fixed length that `sampling.cut` would leave out."""
        if self.config.fixed_length and run.sampling.cut == "mask":
            raise ConfigError(
                "sampling.cut mask does not fit objective.fixed_length: thoughts without an end count and "
                "may not be left out. Set force_close or penalise"
            )

    def prompt(self, position: Position) -> Prompt:
        """A prompt whose thought nothing ends, with the close tag between thought and target."""
        prompt = super().prompt(position)
        if not self.config.fixed_length:
            return prompt
        return replace(prompt, stop_ids=(), close_ids=(), join_ids=(*prompt.close_ids, *prompt.join_ids))

    def advantage(self, reward: Tensor, groups: Sequence[Group]) -> Tensor:
        """max(0, reward − mean) [B, G]; 0 for a thought without a reward, or alone in its group."""
        advantage = leave_one_out(reward)
        if self.config.advantage == "group_mean":
            n = (~reward.isnan()).sum(1, keepdim=True).clamp(min=1)
            advantage = advantage * (n - 1) / n
        return advantage.clamp(min=0) if self.config.clamp else advantage


OBJECTIVE = QuietSTaR
