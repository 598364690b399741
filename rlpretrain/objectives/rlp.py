"""RLP: reinforcement as a pretraining objective (arXiv 2510.01265).

Before the next token x_t of ordinary text the model samples a thought c. The thought earns the information
gain

    r(c) = log p(x_t | x_<t, c) - log p(x_t | x_<t)

in nats, where the second term is the baseline's (the paper: a slow moving average of the model). Advantages
are leave-one-out within the G thoughts of a position (eq. 7), and only the log-probs of thought tokens are
trained: the reward is a constant. Since the baseline is the same for all G thoughts it cancels in the
advantage exactly; it matters for `clip`, for what is logged, and for objectives that compare positions.

Our additions: targets of several tokens (`target_length`) with a discounted horizon, the reader term
(`loss.reader_coef`) and the interleaved next-token loss (`loss.ntp_coef`); `recipe: paper` switches the last
two off.

Pitfalls: a short thought limit cuts thoughts off, and `sampling.cut` says what such a thought counts. A
template alone can change log p, so `no_think` names the context of the no-think arm. The gain against the
current model grows if the no-think arm gets worse, so the gain against the frozen model is logged too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from rewards import information_gain
from rlpretrain.objectives import base
from rlpretrain.types import Scores
from rollout.types import Group


@dataclass(kw_only=True)
class Config(base.Config):
    """RLP's own fields."""

    discount: float = 1.0
    """Weight γ^k of the k-th target token; 0 or target_length 1 is the paper."""
    reduction: Literal["sum", "mean"] = "sum"
    """Gain of a longer target: sum over its tokens, or discounted mean."""
    clip: float | None = None
    """Largest absolute gain of a single token, in nats; none in the paper."""


class RLP(base.Objective):
    """Reward each thought by how much it helps to predict the text that really follows."""

    Config = Config

    def reward(self, groups: Sequence[Group], scores: Scores) -> Tensor:
        """The information gain [B, G] in nats."""
        c = self.config
        return information_gain(
            scores.target_logps,
            scores.baseline_logps,
            scores.target_mask,
            discount=c.discount,
            reduction=c.reduction,
            clip=c.clip,
        )


OBJECTIVE = RLP
