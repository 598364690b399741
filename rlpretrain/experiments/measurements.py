"""The numbers of one model at held-out positions, and their means and intervals."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rlpretrain.evaluation.intervals import interval, points

Numbers = dict[str, list[Any]]
"""Number to its value at each position; null where it does not apply."""


@dataclass(frozen=True, slots=True)
class Measurements:
    """The numbers of one model at held-out positions, the same positions for each seed."""

    by_seed: Sequence[Numbers]
    rows: Sequence[str]
    """The source row of each position."""
    meta: dict[str, list[str]] = field(default_factory=dict)
    """Columns of the positions' documents."""

    def has(self, number: str) -> bool:
        """Whether it was measured."""
        return number in self.by_seed[0]

    def where(self, column: str, values: Collection[str]) -> Measurements:
        """Only the positions whose documents have one of `values` in a column."""
        keep = [value in values for value in self.meta[column]]

        def kept(items: Sequence[Any]) -> list[Any]:
            return [item for item, wanted in zip(items, keep, strict=True) if wanted]

        return Measurements(
            [{name: kept(items) for name, items in seed.items()} for seed in self.by_seed],
            kept(self.rows),
            {name: kept(items) for name, items in self.meta.items()},
        )

    def array(self, number: str) -> np.ndarray:
        """[seeds, positions]; NaN where the number does not apply."""
        return np.array([seed[number] for seed in self.by_seed], float)

    def weights(self, number: str) -> np.ndarray | None:
        """A loss per token is weighted by the document's tokens; all other numbers count equally."""
        return self.array("tokens") if number == "no_think_loss" else None

    def interval(self, number: str, minus: Measurements | None = None) -> list[float]:
        """[mean, low, high] over source rows and seeds; with `minus`, of the differences from that model."""
        values = self.array(number)
        if minus is not None:
            values = values - minus.array(number)
        mean, (low, high) = interval(values, self.weights(number), rows=self.rows)
        return [mean, low, high]

    def means(self, number: str) -> list[float]:
        """The mean of each seed."""
        return points(self.array(number), self.weights(number)).tolist()
