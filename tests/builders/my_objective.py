"""A user's objective in a module of its own: found by path, with its own field."""

from __future__ import annotations

from dataclasses import dataclass, replace

from rlpretrain.objectives import base


@dataclass(kw_only=True)
class Config(base.Config):
    """One field more."""

    wanted: int = 3
    """Length that a thought should have."""


class LengthObjective(base.Objective):
    """Rewards need no live log-probs here, so they are stored on the groups; groups without variance are
    dropped.
    """

    Config = Config
    needs = frozenset()

    async def add_rewards(self, engine, groups):
        return [
            replace(g, rewards=tuple(-abs(len(t.token_ids) - self.config.wanted) for t in g.thoughts))
            for g in groups
        ]

    def select(self, groups):
        return [g for g in groups if len(set(g.rewards)) > 1]
