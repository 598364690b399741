"""A control: thoughts are rewarded at random, so no improvement comes from the reward.

Everything else is as in RLP: positions, thoughts, update, next-token loss, reader term. A base model may
still change under random rewards, since clipping and length weights are biased; this control shows that
effect. The gain is logged as usual.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np
from pydantic import Field

from rlpretrain.objectives import base
from rollout.engine import Engine
from rollout.types import Group


@dataclass(kw_only=True)
class Config(base.Config):
    """The shared fields, and the probability of a reward."""

    probability: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Share of thoughts with reward 1; the others have 0."""


class RandomReward(base.Objective):
    """Reward thoughts at random."""

    Config = Config

    async def add_rewards(self, engine: Engine, groups: list[Group]) -> list[Group]:
        """Rewards that depend on the thoughts' seeds alone."""
        out = []
        for group in groups:
            rewards = tuple(self._reward(thought.seed, i) for i, thought in enumerate(group.thoughts))
            out.append(replace(group, rewards=rewards))
        return out

    def _reward(self, seed: int, index: int) -> float:
        """1 or 0, from the seed of a thought and its index in the group."""
        return float(np.random.default_rng((seed, 1, index)).random() < self.config.probability)


OBJECTIVE = RandomReward
