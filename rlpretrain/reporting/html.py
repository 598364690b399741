"""The HTML page of a report: what its parts look like, and what may not get into it.

Everything in a thought is hostile until it is escaped: it was sampled by a model from text that anybody may
have written. The page loads nothing and runs no script but its own search.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import yaml

from rlpretrain import __version__
from rlpretrain.data.token_text import TokenReader
from rlpretrain.reporting.token_gains import CONTROLS, Place
from rlpretrain.tracking.console import shown
from rlpretrain.tracking.health import Health
from rlpretrain.tracking.metrics import METRICS
from rlpretrain.types import Document

CURVES: Mapping[str, Sequence[str]] = {
    "information gain (nats)": ("ig/mean", "ig/frozen", "ig/self", "eval/gain_frozen"),
    "gain of thoughts that should not help": ("eval/empty", "eval/shuffled", "eval/other"),
    "reward": ("reward", "reward_std", "frac_reward_zero_std"),
    "thought length (tokens)": ("completions/mean_length", "completions/max_length"),
    "how thoughts end (share)": ("thought/closed_frac", "completions/clipped_ratio", "thought/eos_frac"),
    "loss without a thought (nats per token)": ("ntp/loss", "eval/no_think_loss"),
    "ratios": (
        "sampling/raw_mean",
        "sampling/raw_ess",
        "sampling/truncated_fraction",
        "clip_ratio/region_mean",
    ),
    "seconds per step": ("step_time", "perf/rollout_s", "perf/train_s", "perf/sync_s"),
}


@dataclass
class Page:
    """What a page shows; what it lacks is said in `missing`."""

    title: str
    documents: list[tuple[Document, list[Place]]] = field(default_factory=list)
    tokenizer: Any = None
    record: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, float]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    about: str = ""


def shade(gain: float, scale: float) -> str:
    """A colour for a gain: blue above 0, orange below, nothing at 0 (told apart by all kinds of colour
    blindness).
    """
    share = min(1.0, abs(gain) / scale) * 0.75
    return f"rgba({'38,119,217' if gain > 0 else '230,115,0'},{share:.2f})"


def warnings_of(rows: Sequence[Mapping[str, float]], found: Sequence[Place]) -> list[str]:
    """What is wrong with a run, in words: what the console said while it went on, then what the shown
    thoughts are worth.
    """
    out = [f"Step {finding.step}: {finding.text}" for finding in Health().replay(rows)]
    gains = [g for p in found for g in [row.gain for row in p.rows] if g is not None]
    empty = [p.controls["empty"] for p in found if "empty" in p.controls]
    if gains and np.mean(gains) < -0.05:
        beside = f", an empty one {np.mean(empty):.2f}" if empty else ""
        out.append(
            f"Thoughts cost: these gain {np.mean(gains):.2f} nats on average{beside}: the model predicts "
            "better without."
        )
    if gains and empty and np.mean(gains) > 0.05 and np.mean(empty) > 0.8 * np.mean(gains):
        out.append(
            f"Delimiter only: an empty thought gains {np.mean(empty):.2f} nats, a real one "
            f"{np.mean(gains):.2f}: what is thought adds little."
        )
    return out


def curves(rows: Sequence[Mapping[str, float]]) -> list[tuple[str, str, str]]:
    """(title, inline SVG, what it shows in words) of every panel that has data."""
    import matplotlib
    from matplotlib.figure import Figure

    out = []
    colours = ("#2677d9", "#e67300", "#7a7a7a", "#9b59b6")
    grey = dict.fromkeys(
        ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"), "#888"
    )
    style = {**grey, "svg.fonttype": "none", "svg.hashsalt": "rlpretrain", "font.size": 8}
    for title, names in CURVES.items():
        lines = {
            n: [(r["step"], r[n]) for r in rows if n in r and "step" in r and np.isfinite(r[n])]
            for n in names
        }
        lines = {n: points for n, points in lines.items() if points}
        if not lines:
            continue
        with matplotlib.rc_context(style):
            figure = Figure(figsize=(4.2, 2.3), layout="constrained")
            axis = figure.subplots()
            for (name, points), colour in zip(lines.items(), colours, strict=False):
                points = points[:: max(1, len(points) // 400)]
                marker = "." if len(points) < 3 else ""
                axis.plot(*zip(*points, strict=True), label=name, color=colour, linewidth=1.2, marker=marker)
            axis.legend(frameon=False, fontsize=7)
            axis.spines[["top", "right"]].set_visible(False)
            text = io.StringIO()
            figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
        svg = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>c{len(out)}-", text.getvalue())  # ids are the page's
        words = "; ".join(f"{n} from {p[0][1]:.3g} to {p[-1][1]:.3g}" for n, p in lines.items())
        out.append((title, svg[svg.index("<svg") :], words))
    return out


def render(page: Page) -> str:
    """The page as HTML."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    found = [place for _, there in page.documents for place in there]
    gains = [abs(g) for place in found for row in place.rows for g in row.gains if np.isfinite(g)]
    scale = float(np.quantile(gains, 0.95)) if gains else 1.0
    try:
        panels = curves(page.rows)
    except ImportError:
        panels = []
        page.missing.append('curves: pip install "rlpretrain[plot]"')
    settings = (
        yaml.safe_dump(page.record.get("config"), sort_keys=False, allow_unicode=True)
        if page.record.get("config")
        else ""
    )
    documents = []
    if page.documents:
        reader = TokenReader(page.tokenizer)
        documents = [_document(d, there, reader, max(scale, 1e-6)) for d, there in page.documents]
    return environment.get_template("report.html.jinja").render(
        page=page,
        documents=documents,
        panels=panels,
        warnings=warnings_of(page.rows, found),
        scale=scale,
        controls=CONTROLS,
        version=__version__,
        last=page.rows[-1] if page.rows else {},
        meanings=METRICS,
        settings=settings,
    )


def _document(
    document: Document, there: Sequence[Place], reader: TokenReader, scale: float
) -> dict[str, Any]:
    """A document for the template: pieces of text, each target token one of its own, and its positions."""
    tokens = reader(document.token_ids)
    marks: dict[int, tuple[float | None, int]] = {}
    for k, place in enumerate(there):
        index = place.group.position.index
        values: Sequence[float | None] = place.gains or [None] * max(1, len(place.group.position.target_ids))
        for j, gain in enumerate(values):
            if index + j < len(tokens):
                marks.setdefault(index + j, (gain, k))
    pieces: list[dict[str, Any]] = []
    at = 0
    for marked in sorted(marks):
        gain, k = marks[marked]
        pieces.append({"text": shown("".join(token.text for token in tokens[at:marked]), 20_000)})
        text, label = shown(tokens[marked].inline), shown(tokens[marked].spelled)
        pieces.append(
            {"text": text, "label": label, "gain": gain, "place": k, "colour": shade(gain or 0.0, scale)}
        )
        at = marked + 1
    pieces.append({"text": shown("".join(token.text for token in tokens[at:]), 20_000)})
    return {
        "id": shown(document.id, 80),
        "pieces": pieces,
        "places": [_place(place, reader, scale) for place in there],
    }


def _place(place: Place, reader: TokenReader, scale: float) -> dict[str, Any]:
    group, position = place.group, place.group.position
    scored = [row.gain for row in place.rows if row.gain is not None]
    target = [token.spelled for token in reader(position.target_ids, after=position.context_ids)]
    rows = []
    for row in place.rows:
        thought, gains = row.thought, zip(target, row.gains, strict=False)
        rows.append(
            {
                "text": shown(reader.text(thought.token_ids, after=group.prompt.token_ids)),
                "length": len(thought.token_ids),
                "finish": str(thought.finish_reason),
                "reward": row.reward,
                "advantage": row.advantage,
                "gain": row.gain,
                "tokens": [
                    {"text": shown(text, 40), "gain": gain, "colour": shade(gain, scale)}
                    for text, gain in gains
                ],
            }
        )
    return {
        "index": position.index,
        "role": group.role,
        "gain": float(np.mean(scored)) if scored else None,
        "target": shown("".join(target), 400),
        "controls": place.controls,
        "rows": rows,
    }
