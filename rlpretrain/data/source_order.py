"""The order in which documents are drawn from several sources."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


class SourceOrder:
    """Which source each draw of the global order is from; the same on every rank.

    Draws come in blocks of `block`. Inside a block each source has its share to within about one draw, and
    what is missing is carried over, so that the long-run share is exact (largest remainder). The order inside
    a block is random by (`seed`, the block's first draw). Nothing depends on the order of the names.

    `limits` has the number of draws after which a source is left out and its share goes to the others. A
    source without a limit has no end. When none of the `required` sources (by default all) is left, `is_over`
    is set and all continue.
    """

    def __init__(self, names: list[str], *, block: int, seed: int, limits: Mapping[str, int] | None = None):
        self.names, self.block_size, self.seed = sorted(names), block, seed
        self.limits = dict(limits or {})
        self.position = 0  # the next draw of the global order
        self.counts = dict.fromkeys(self.names, 0)  # draws before `position`
        self.required = set(names)
        self.is_over = False
        self._shares: list[tuple[int, dict[str, float]]] = []  # from a draw on: now, and changes to come
        self._credits = dict.fromkeys(self.names, 0.0)  # draws that are owed, at the start of the block
        self._block: list[str] = []  # what is left of the present block
        self._planned: dict[str, float] = {}  # the shares by which it was planned
        self._drawn: list[str] = []  # what was drawn of it

    def set_shares(self, shares: Mapping[str, float], first: int) -> None:
        """Draw with these shares from draw `first` on; they need not sum to 1.

        Raises ValueError if `first` was drawn already, or if all shares are 0.
        """
        total = sum(shares.values())
        if first < self.position:
            raise ValueError(f"draw {first} is over, the next is {self.position}")
        if not total > 0:
            raise ValueError("the shares of all sources are 0")
        normalised = {name: shares.get(name, 0.0) / total for name in self.names}
        if self._shares and self._shares[-1][1] == normalised:
            return
        self._shares = [change for change in self._shares if change[0] < first]
        self._shares.append((first, normalised))

    def next_draw(self) -> tuple[str, int]:
        """The source of the next draw, and the number of its draws before this one."""
        if len(self._shares) > 1 and self._shares[1][0] <= self.position:
            self._close_block()
            del self._shares[0]
        if not self._block:
            self._close_block()
            self._block = self._plan_block()
        name = self._block.pop(0)
        self._drawn.append(name)
        number = self.counts[name]
        self.counts[name] += 1
        self.position += 1
        return name, number

    def state_dict(self) -> dict[str, Any]:
        """The cursor, as plain values."""
        return {
            "position": self.position,
            "counts": dict(self.counts),
            "is_over": self.is_over,
            "shares": [[first, dict(shares)] for first, shares in self._shares],
            "credits": dict(self._credits),
            "block": list(self._block),
            "planned": dict(self._planned),
            "drawn": list(self._drawn),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to a cursor that `state_dict` gave."""
        self.position, self.counts = state["position"], dict(state["counts"])
        self.is_over = state["is_over"]
        self._shares = [(first, dict(shares)) for first, shares in state["shares"]]
        self._credits = dict(state["credits"])
        self._block, self._drawn = list(state["block"]), list(state["drawn"])
        self._planned = dict(state["planned"])

    def _close_block(self) -> None:
        """Carry over what the sources are owed after the draws of the present block."""
        for name, share in self._planned.items():
            self._credits[name] += len(self._drawn) * share - self._drawn.count(name)
        self._block, self._drawn = [], []

    def _plan_block(self) -> list[str]:
        """The sources of the next block, in the order of drawing."""
        shares = self._planned = self._available_shares()
        credits, counts = dict(self._credits), dict(self.counts)
        planned = []
        for _ in range(self.block_size):
            for name, share in shares.items():
                credits[name] += share
            name = max(shares, key=lambda name: credits[name])  # the first of equals, in the order of names
            credits[name] -= 1.0
            counts[name] += 1
            planned.append(name)
            if counts[name] == self.limits.get(name):
                break  # the next block is without it
        order = np.random.default_rng([self.seed, self.position]).permutation(len(planned))
        return [planned[k] for k in order]

    def _available_shares(self) -> dict[str, float]:
        """The present shares of the sources that are not exhausted; of all if no required one is left."""
        positive = {name: share for name, share in self._shares[0][1].items() if share > 0}
        left = {
            name: share
            for name, share in positive.items()
            if name not in self.limits or self.counts[name] < self.limits[name]
        }
        if not self.required & left.keys():
            self.is_over, left = True, positive
        total = sum(left.values())
        return {name: share / total for name, share in left.items()}
