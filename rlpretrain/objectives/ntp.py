"""NTP: plain next-token prediction, the control of every experiment; an objective without positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rlpretrain.objectives import base
from rollout.types import Position


@dataclass(kw_only=True)
class Config:
    """NTP has no fields. Its loss is the mean over all predicted tokens of the step, without `ntp_coef`."""


class NTP(base.Objective):
    """Continue plain pretraining."""

    Config = Config
    needs = frozenset()
    has_positions = False

    def positions(self, document: Any, rng: Any, trunk: Any = None) -> list[Position]:
        """An empty list: there are no thoughts."""
        return []


OBJECTIVE = NTP
