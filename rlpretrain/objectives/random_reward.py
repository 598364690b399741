"""A control: thoughts are rewarded at random, so whatever improves is not owed to the reward.

Everything else is as in RLP: positions, thoughts, update, next-token loss, reader term. A base model may
still change under random rewards (clipping and length weights have a direction of their own), which is what
this is there to show. The gain is logged as ever.
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
    """One field more."""

    probability: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Share of thoughts that earn 1; the others earn 0."""


class RandomReward(base.Objective):
    """Reward thoughts by the toss of a coin."""

    Config = Config

    async def add_rewards(self, engine: Engine, groups: list[Group]) -> list[Group]:
        """Rewards that depend on the thoughts' seeds alone."""
        return [
            replace(
                g,
                rewards=tuple(
                    float(np.random.default_rng((t.seed, 1, i)).random() < self.config.probability)
                    for i, t in enumerate(g.thoughts)
                ),
            )
            for g in groups
        ]


OBJECTIVE = RandomReward
