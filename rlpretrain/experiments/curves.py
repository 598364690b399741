"""The curves of `rlpretrain compare`: what the runs logged, over steps and over tokens of documents."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlpretrain.experiments.experiment import Experiment

PANELS = {
    "ntp/loss": "next-token loss (nats)",
    "ntp/trained_loss": "next-token loss of the trained tokens (nats)",
    "reward": "reward",
    "ig/frozen": "gain against the initial model (nats)",
    "eval/no_think_loss": "held-out loss without a thought (nats)",
    "eval/gain_frozen": "held-out gain (nats)",
    "eval_averaged/no_think_loss": "the same loss of the averaged weights",
    "eval_averaged/gain_frozen": "the same gain of the averaged weights",
}
"""A metric of the log and the label of its axis."""
AXES = {"step": "steps", "num_input_tokens": "tokens of documents"}
"""A metric of the log that is a horizontal axis, and its label."""
SOURCE_LOSS = re.compile(r"eval/(.+)/no_think_loss")
"""The held-out loss of a named source, in the log."""
MOST_POINTS = 200
"""Points of a line; neighbours are averaged."""


@dataclass(frozen=True, slots=True)
class Curve:
    """One metric of a method's runs at the steps at which all seeds logged it."""

    along: dict[str, np.ndarray]
    """[points] of each axis, the mean over seeds."""
    values: np.ndarray
    """[seeds, points]."""


Log = list[dict[str, float | None]]
"""The rows of a run's metrics.jsonl."""


def read_logs(folders: Sequence[Path]) -> list[Log]:
    """The logs of one method's runs."""
    files = [folder / "metrics.jsonl" for folder in folders]
    return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]


def make_curve(logs: Sequence[Log], metric: str) -> Curve | None:
    """The curve of one method's runs; None if they have no step at which all logged the metric."""
    by_step = [{row["step"]: row for row in log if row.get(metric) is not None} for log in logs]
    steps = sorted(set.intersection(*(set(rows) for rows in by_step)))
    if not steps:
        return None

    def table(name: str) -> np.ndarray:
        values = np.array([[rows[step][name] for step in steps] for rows in by_step], float)
        parts = np.array_split(values, min(MOST_POINTS, len(steps)), axis=1)
        return np.stack([part.mean(1) for part in parts], axis=1)

    return Curve({axis: table(axis).mean(0) for axis in AXES}, table(metric))


def source_panels(logs: Mapping[str, Sequence[Log]]) -> dict[str, str]:
    """A panel for the held-out loss of each source of `eval.data`: metric to label."""
    metrics = {metric for of_method in logs.values() for log in of_method for row in log for metric in row}
    found = {metric: SOURCE_LOSS.fullmatch(metric) for metric in sorted(metrics)}
    return {metric: f"held-out loss of {match[1]} (nats)" for metric, match in found.items() if match}


def plot_curves(experiment: Experiment, path: Path) -> None:
    """A row of panels for each metric that some method logged, as an SVG file.

    Lines are means over seeds, and the pale lines are the seeds.
    """
    import matplotlib
    from matplotlib.figure import Figure

    folder = Path(experiment.output_dir)
    runs = {name: [folder / f"{name}-{seed}" for seed in experiment.seeds] for name in experiment.methods}
    logs = {name: read_logs(folders) for name, folders in runs.items()}
    panels = PANELS | source_panels(logs)
    curves = {metric: {name: make_curve(logs[name], metric) for name in logs} for metric in panels}
    logged = {metric: lines for metric, lines in curves.items() if any(lines.values())}
    if not logged:
        return
    figure = Figure(figsize=(12, 3.2 * len(logged) + 0.4), layout="constrained")
    axes = figure.subplots(len(logged), len(AXES), squeeze=False, sharey="row")
    for row, (metric, lines) in zip(axes, logged.items(), strict=True):
        for panel, (axis, label) in zip(row, AXES.items(), strict=True):
            for place, (name, curve) in enumerate(lines.items()):
                if curve is not None:
                    _draw(panel, curve, axis, name, f"C{place % 10}")
            panel.grid(alpha=0.3)
            panel.set_xlabel(label)
        row[0].set_ylabel(panels[metric])
        row[0].legend(frameon=False, fontsize=8)
    with matplotlib.rc_context({"svg.hashsalt": "rlpretrain"}):  # the same numbers give the same file
        figure.savefig(path, format="svg", metadata={"Date": None})


def _draw(panel: Any, curve: Curve, axis: str, name: str, colour: str) -> None:
    x = curve.along[axis]
    marker = "o" if len(x) == 1 else None
    for seed in curve.values:
        panel.plot(x, seed, color=colour, alpha=0.25, linewidth=0.6)
    panel.plot(x, curve.values.mean(0), color=colour, label=name, linewidth=1.4, marker=marker)
