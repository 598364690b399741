"""A control: a thought is rewarded for its form alone, a close tag after at least so many tokens, whatever it
says.

Part of what a reward teaches a base model is to close its thoughts; this measures that part by itself.
Everything else is as in RLP, and the gain is logged as ever. Use `sampling.cut: force_close`, or thoughts
that did not close count nowhere and all others earn the same.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from rlpretrain.config import Count
from rlpretrain.objectives import base
from rollout.engine import Engine
from rollout.types import FinishReason, Group


@dataclass(kw_only=True)
class Config(base.Config):
    """One field more."""

    least: Count = 2
    """Tokens that a thought must have, the close tag included."""


class FormatOnly(base.Objective):
    """Reward thoughts that close themselves."""

    Config = Config

    async def add_rewards(self, engine: Engine, groups: list[Group]) -> list[Group]:
        """1 for thoughts that have the form, 0 for the others."""
        return [
            replace(
                g,
                rewards=tuple(
                    float(t.finish_reason is FinishReason.CLOSE and len(t.token_ids) >= self.config.least)
                    for t in g.thoughts
                ),
            )
            for g in groups
        ]


OBJECTIVE = FormatOnly
