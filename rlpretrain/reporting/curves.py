"""The curves of a report, as inline SVG."""

from __future__ import annotations

import io
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

Points = list[tuple[float, float]]
"""(step, value) of each step."""


@dataclass(frozen=True, slots=True)
class Panel:
    """One plot of a report."""

    title: str
    svg: str
    summary: str
    """First and last value of each curve, in words."""


def draw_curves(rows: Sequence[Mapping[str, float]]) -> list[Panel]:
    """A panel for each entry of `CURVES` that has data."""
    panels: list[Panel] = []
    for title, names in (*CURVES.items(), *_source_curves(rows).items(), *_task_curves(rows).items()):
        curves = {name: _points(rows, name) for name in names}
        curves = {name: points for name, points in curves.items() if points}
        if not curves:
            continue
        ends = [f"{name} from {points[0][1]:.3g} to {points[-1][1]:.3g}" for name, points in curves.items()]
        svg = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>c{len(panels)}-", _draw(curves))  # unique in the page
        panels.append(Panel(title, svg[svg.index("<svg") :], "; ".join(ends)))
    return panels


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


def _draw(curves: Mapping[str, Points]) -> str:
    import matplotlib
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "rlpretrain", "font.size": 8}
    for part in ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"):
        style[part] = "#888"
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(4.2, 2.3), layout="constrained")
        axis = figure.subplots()
        for (name, points), colour in zip(curves.items(), COLOURS, strict=False):
            points = points[:: max(1, len(points) // MOST_POINTS)]
            marker = "." if len(points) < 3 else ""
            axis.plot(*zip(*points, strict=True), label=name, color=colour, linewidth=1.2, marker=marker)
        axis.legend(frameon=False, fontsize=7)
        axis.spines[["top", "right"]].set_visible(False)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    return text.getvalue()
