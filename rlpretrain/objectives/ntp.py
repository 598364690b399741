"""NTP: plain next-token prediction, an objective without positions. The control of every experiment, in
the same loop.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rlpretrain.objectives import base
from rollout.types import Position


@dataclass(kw_only=True)
class Config:
    """NTP has no fields; its loss is the mean over all predicted tokens of the step, whatever
    `loss.ntp_coef` says.
    """


class NTP(base.Objective):
    """Continue the pretraining as usual."""

    Config = Config
    needs = frozenset()
    has_positions = False

    def positions(self, document: Any, rng: Any, trunk: Any = None) -> list[Position]:
        """None: no thoughts."""
        return []


OBJECTIVE = NTP
