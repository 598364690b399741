"""A control: a thought is rewarded only for its form, a close tag after at least `least` tokens.

One thing that a reward teaches a base model is to close its thoughts; this control measures it alone.
Everything else is as in RLP, and the gain is logged as usual. Use `sampling.cut: force_close`. Otherwise
unclosed thoughts do not count, and all others have the same reward.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from rlpretrain.config import Count
from rlpretrain.objectives import base
from rollout.engine import Engine
from rollout.types import FinishReason, Group, Thought


@dataclass(kw_only=True)
class Config(base.Config):
    """The shared fields, and the shortest thought."""

    least: Count = 2
    """Fewest tokens of a rewarded thought, the close tag included."""


class FormatOnly(base.Objective):
    """Reward thoughts that close themselves."""

    Config = Config

    async def add_rewards(self, engine: Engine, groups: list[Group]) -> list[Group]:
        """1 for thoughts that have the form, 0 for the others."""
        out = []
        for group in groups:
            rewards = tuple(float(self._has_form(thought)) for thought in group.thoughts)
            out.append(replace(group, rewards=rewards))
        return out

    def _has_form(self, thought: Thought) -> bool:
        return thought.finish_reason is FinishReason.CLOSE and len(thought.token_ids) >= self.config.least


OBJECTIVE = FormatOnly
