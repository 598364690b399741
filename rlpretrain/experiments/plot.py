"""The plots of `rlpretrain compare`, but for the curves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlpretrain.experiments.answer_parts import Parts, numbers_shown
from rlpretrain.experiments.experiment import BASE
from rlpretrain.experiments.results import HEADINGS


@dataclass(frozen=True, slots=True)
class Series:
    """One number of every method in a panel."""

    number: str
    marker: str
    shift: float
    """Vertical offset from the method's line."""


ACCURACY = (Series("think_sampled", "o", 0.12), Series("direct", "s", -0.12))
GAIN = (Series("gain_frozen", "o", 0.12), Series("shuffled", "s", -0.12))


def plot(results: dict[str, Any], path: Path) -> None:
    """Accuracy, gain, and paired differences from the first method, with intervals, as an SVG file.

    The pale marks are the seeds.
    """
    import matplotlib
    from matplotlib.figure import Figure

    names = list(results["methods"])[::-1]
    figure = Figure(figsize=(14, 0.34 * len(names) + 1.4), layout="constrained")
    accuracy, gain, paired = figure.subplots(1, 3, sharey=True)
    for axis, panel in ((accuracy, ACCURACY), (gain, GAIN)):
        for series in panel:
            _draw_methods(axis, results["methods"], names, series)
        axis.grid(axis="x", alpha=0.3)
        axis.legend(frameon=False, fontsize=8)
    accuracy.set(yticks=range(len(names)), yticklabels=names)
    accuracy.set(xlabel="share of held-out positions", xlim=(0, 1))
    gain.set(xlabel="nats against the frozen base")
    first = next(name for name in results["methods"] if name != BASE)
    for series in ACCURACY:
        _draw_differences(paired, results["differences"], names, first, series)
    paired.axvline(0, color="black", linewidth=0.6)
    paired.grid(axis="x", alpha=0.3)
    paired.set(xlabel=f"the same minus that of {first}, paired")
    with matplotlib.rc_context({"svg.hashsalt": "rlpretrain"}):  # the same numbers give the same file
        figure.savefig(path, format="svg", metadata={"Date": None})


def plot_parts(parts: Parts, models: Sequence[str], path: Path) -> None:
    """A panel for each number that `numbers_shown` names: means and intervals by part, as SVG."""
    import matplotlib
    from matplotlib.figure import Figure

    numbers = numbers_shown(parts)
    width = max(4.0, 0.1 * len(models) * len(parts))
    figure = Figure(figsize=(width, 2.8 * len(numbers) + 0.6), layout="constrained")
    panels = figure.subplots(len(numbers), 1, sharex=True, squeeze=False)[:, 0]
    for panel, number in zip(panels, numbers, strict=True):
        for place, name in enumerate(models):
            shift = 0.7 * ((place + 0.5) / len(models) - 0.5)
            rows = [numbers_of[name][number] for numbers_of in parts.values()]
            mean, low, high = np.array(rows, float).T
            lengths = np.nan_to_num([mean - low, high - mean])
            panel.errorbar(
                np.arange(len(parts)) + shift, mean, yerr=lengths, fmt=".", capsize=1.5, label=name
            )
        panel.set(ylabel=number, ylim=(-0.02, 1.02))
        panel.grid(axis="y", alpha=0.3)
    panels[-1].set(xticks=range(len(parts)), xticklabels=list(parts))
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8
    )
    with matplotlib.rc_context({"svg.hashsalt": "rlpretrain"}):  # the same numbers give the same file
        figure.savefig(path, format="svg", metadata={"Date": None})


def _draw_methods(axis: Any, methods: dict[str, Any], names: list[str], series: Series) -> None:
    rows = {
        line + series.shift: methods[name]
        for line, name in enumerate(names)
        if series.number in methods[name]
    }
    intervals = {height: row[series.number] for height, row in rows.items()}
    colour = _draw_intervals(axis, intervals, series)
    for height, row in rows.items():
        seeds = row["by_seed"][series.number]
        axis.plot(seeds, [height] * len(seeds), "|", color=colour, alpha=0.5, markersize=5)


def _draw_differences(
    axis: Any, differences: dict[str, Any], names: list[str], first: str, series: Series
) -> None:
    intervals = {}
    for line, name in enumerate(names):
        row = differences.get(f"{name} - {first}", {})
        if values := row.get(series.number):
            intervals[line + series.shift] = values
    _draw_intervals(axis, intervals, series)


def _draw_intervals(axis: Any, intervals: dict[float, list[float | None]], series: Series) -> Any:
    """Draw a mean and its interval at each height; returns the colour."""
    mean, low, high = (np.array([row[k] for row in intervals.values()], float) for k in range(3))
    lengths = np.nan_to_num([mean - low, high - mean])
    label = HEADINGS[series.number]
    bars = axis.errorbar(mean, list(intervals), xerr=lengths, fmt=series.marker, capsize=2, label=label)
    return bars[0].get_color()
