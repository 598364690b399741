"""The curves of a report, as inline SVG."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

CURVES: Mapping[str, Sequence[str]] = {
    "information gain (nats)": (
        "ig/mean",
        "ig/frozen",
        "ig/self",
        "eval/gain_frozen",
        "eval_averaged/gain_frozen",
    ),
    "gain of thoughts that should not help": ("eval/empty", "eval/shuffled", "eval/other"),
    "reward": ("reward", "reward_std", "frac_reward_zero_std"),
    "thought length (tokens)": ("completions/mean_length", "completions/max_length"),
    "how thoughts end (share)": ("thought/closed_frac", "completions/clipped_ratio", "thought/eos_frac"),
    "loss without a thought (nats per token)": (
        "ntp/loss",
        "ntp/trained_loss",
        "eval/no_think_loss",
        "eval_averaged/no_think_loss",
    ),
    "ratios": (
        "sampling/raw_mean",
        "sampling/raw_ess",
        "sampling/truncated_fraction",
        "clip_ratio/region_mean",
    ),
    "seconds per step": ("step_time", "perf/rollout_s", "perf/train_s", "perf/sync_s"),
    "tokens trained per second": ("perf/tokens_per_s",),
    "share of the GPUs' peak (MFU)": ("perf/mfu", "perf/step_mfu"),
}
"""Title of each panel, and its metrics."""
COLOURS = (
    "#2677d9",
    "#e67300",
    "#7a7a7a",
    "#9b59b6",
    "#2e8b57",
    "#c0392b",
    "#16a5a5",
    "#b8860b",
    "#d264a0",
    "#556b2f",
)
MOST_POINTS = 400
LINES = ("-", "--", "-.", ":")
"""The lines of a panel's curves: where two meet, both can be seen."""

Points = list[tuple[float, float]]
"""(step, value) of each step."""
Rows = Sequence[Mapping[str, float]]


@dataclass(frozen=True, slots=True)
class Panel:
    """One plot of a report."""

    title: str
    svg: str
    summary: str
    """First and last value of each curve, in words."""


def draw_curves(rows: Rows, others: Mapping[str, Rows] | None = None) -> list[Panel]:
    """A panel for each entry of `CURVES` that has data; `others` are the rows of runs to compare with."""
    panels: list[Panel] = []
    for title, names in (*CURVES.items(), *_source_curves(rows).items(), *_task_curves(rows).items()):
        curves = _curves(rows, names)
        if not curves:
            continue
        more = {run: _curves(of_run, names) for run, of_run in (others or {}).items()}
        words = [_in_words(name, points) for name, points in curves.items()]
        words += [f"{run}: {_in_words(n, points)}" for run in more for n, points in more[run].items()]
        svg = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>c{len(panels)}-", _draw(curves, more))  # unique
        panels.append(Panel(title, svg[svg.index("<svg") :], "; ".join(words)))
    return panels


def _curves(rows: Rows, names: Sequence[str]) -> dict[str, Points]:
    curves = {name: _points(rows, name) for name in names}
    return {name: points for name, points in curves.items() if points}


def _in_words(name: str, points: Points) -> str:
    return f"{name} from {points[0][1]:.3g} to {points[-1][1]:.3g}"


def _source_curves(rows: Sequence[Mapping[str, float]]) -> dict[str, list[str]]:
    """Panels with a curve for each named source."""
    logged = {name for row in rows for name in row}
    patterns = {
        "share of each source": r"source/(.+)/weight",
        "next-token loss of each source (nats per token)": r"source/(.+)/loss",
        "held-out loss of each source (nats per token)": r"eval/((?!tasks/).+)/no_think_loss",
        "held-out loss of each source's answers (nats per token)": r"eval/((?!tasks/).+)/answer_loss",
    }
    return {
        title: sorted(name for name in logged if re.fullmatch(pattern, name))
        for title, pattern in patterns.items()
    }


def _task_curves(rows: Sequence[Mapping[str, float]]) -> dict[str, list[str]]:
    """A panel for each metric of each task: both ways of the policy, and of the base."""
    ways = ("direct", "thinking", "base_direct", "base_thinking")
    logged = {name.rpartition("/")[0] for row in rows for name in row if name.startswith("eval/tasks/")}
    metrics = sorted(name for name in logged if name != "eval/tasks/thoughts")
    return {name.removeprefix("eval/tasks/"): [f"{name}/{way}" for way in ways] for name in metrics}


def _points(rows: Sequence[Mapping[str, float]], name: str) -> Points:
    known = [row for row in rows if name in row and "step" in row]
    return [(row["step"], row[name]) for row in known if np.isfinite(row[name])]


def _merge_equal(runs: Sequence[Mapping[str, Points]]) -> dict[str, str]:
    """The label of each curve to draw; one that another would hide in all runs is named by it: "a = b"."""
    labels: dict[str, str] = {}
    for name in runs[0]:
        same = (other for other in labels if all(_equal(run.get(name), run.get(other)) for run in runs))
        if (other := next(same, None)) is None:
            labels[name] = name
        else:
            labels[other] += f" = {name}"
    return labels


def _equal(one: Points | None, other: Points | None) -> bool:
    """Whether two curves have the same steps, and values a thousandth of their range apart at most."""
    if one is None or other is None:
        return one is other
    a, b = np.array(one), np.array(other)
    if a.shape != b.shape or not np.array_equal(a[:, 0], b[:, 0]):
        return False
    return bool(np.abs(a[:, 1] - b[:, 1]).max() <= 1e-3 * max(np.ptp(a[:, 1]), 1e-12))


def _smooth(values: np.ndarray) -> np.ndarray:
    """Means over a twentieth of the steps around each; short curves as they are."""
    half = len(values) // 40
    if half == 0:
        return values
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    start, stop = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    return (sums[stop] - sums[start]) / (stop - start)


def _draw(curves: Mapping[str, Points], more: Mapping[str, Mapping[str, Points]]) -> str:
    """Curves of a run as SVG; those of other runs have the same colours and other lines."""
    import matplotlib
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "rlpretrain", "font.size": 8}
    for part in ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"):
        style[part] = "#888"
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(4.2, 2.3), layout="constrained")
        axis = figure.subplots()
        labels = _merge_equal([curves, *more.values()])
        for (name, label), colour, line in zip(labels.items(), COLOURS, itertools.cycle(LINES), strict=False):
            _draw_curve(axis, label, curves[name], colour, "-" if more else line)
            for (run, of_run), other in zip(more.items(), itertools.cycle(LINES[1:]), strict=False):
                if name in of_run:
                    _draw_curve(axis, f"{label} ({run})", of_run[name], colour, other)
        axis.legend(frameon=False, fontsize=7)
        axis.spines[["top", "right"]].set_visible(False)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    return text.getvalue()


def _draw_curve(axis: Any, name: str, points: Points, colour: str, line: str) -> None:
    """A smoothed curve over its values."""
    steps, values = np.array(points).T
    smooth, every = _smooth(values), slice(None, None, max(1, len(points) // MOST_POINTS))
    if smooth is not values:
        axis.plot(steps[every], values[every], color=colour, linewidth=0.8, alpha=0.3)
    marker = "." if len(points) < 3 else ""
    look = {"color": colour, "linestyle": line, "linewidth": 1.4, "marker": marker}
    axis.plot(steps[every], smooth[every], label=name, **look)
