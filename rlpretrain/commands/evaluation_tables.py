"""The tables of `rlpretrain eval`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from rich.table import Table

from rlpretrain.evaluation.intervals import interval
from rlpretrain.evaluation.record import MEANING, Evaluation, by_meta

MOST_VALUES = 12
"""Parts that a table is split into; a column with more values is binned."""


def numbers_table(parts: Mapping[str, Evaluation], results: Mapping[str, Any]) -> Table:
    """The numbers of each part in a column."""
    headings = (f"{name} ({len(part.documents)})" for name, part in parts.items())
    table = Table("", *headings, "meaning")
    for name in MEANING:
        if name in results["all"]:
            table.add_row(name, *(_cell(results[part], name) for part in parts), MEANING[name])
    return table


def difference_table(against: str, results: Mapping[str, Any]) -> Table:
    """The numbers of two models, and the first minus the second at the same positions."""
    table = Table("", "all", against, "difference, paired", "meaning")
    for name in MEANING:
        if name in results["difference"]:
            rows = (results["all"], results["against"], results["difference"])
            table.add_row(name, *(_cell(row, name) for row in rows), MEANING[name])
    return table


def difference_of(first: Evaluation, second: Evaluation) -> dict[str, Any]:
    """First minus second at the same positions, each with its 95% interval under the same name with `_ci`.

    Whole source rows are resampled.
    """
    differences: dict[str, Any] = {}
    for name in first.values.keys() & second.values.keys():
        pairs = first.values[name] - second.values[name]
        differences[name], differences[f"{name}_ci"] = interval(pairs, rows=first.rows)
    loss, loss_interval = interval(first.losses - second.losses, first.tokens, rows=first.rows)
    return differences | {"no_think_loss": loss, "no_think_loss_ci": loss_interval}


def split(evaluation: Evaluation, column: str) -> dict[str, Evaluation]:
    """The evaluation by the values of a column.

    Of a column with more than `MOST_VALUES` values, numbers are split at their quartiles, and of texts all
    but the most frequent are one part.
    """
    parts = by_meta(evaluation, column)
    if len(parts) <= MOST_VALUES:
        return parts
    numbers = _numbers(evaluation.meta(column))
    if numbers is None:
        order = sorted(parts, key=lambda value: -len(parts[value].documents))
        values = evaluation.meta(column)
        rest = evaluation.where([value in order[MOST_VALUES - 1 :] for value in values])
        return {value: parts[value] for value in order[: MOST_VALUES - 1]} | {"others": rest}
    edges = np.unique(np.quantile(numbers, [0, 0.25, 0.5, 0.75, 1]))
    bins = np.clip(np.searchsorted(edges, numbers, side="right") - 1, 0, len(edges) - 2)
    quartiles = {}
    for i in range(len(edges) - 1):
        last = i == len(edges) - 2
        name = f"{edges[i]:g} to {edges[i + 1]:g}" if last else f"{edges[i]:g} to below {edges[i + 1]:g}"
        quartiles[name] = evaluation.where((bins == i).tolist())
    return quartiles


def _numbers(values: list[str]) -> np.ndarray | None:
    """Values as numbers; None if one of them is no finite number."""
    try:
        numbers = np.array([float(value) for value in values])
    except ValueError:
        return None
    return numbers if np.isfinite(numbers).all() else None


def _cell(row: Mapping[str, Any], name: str) -> str:
    if name not in row:
        return ""
    low, high = row.get(f"{name}_ci", (math.nan, math.nan))  # NaN: all of it is one source row
    return f"{row[name]:.3f}" + ("" if math.isnan(low) else f" [{low:.3f}, {high:.3f}]")
