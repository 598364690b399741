"""Renders a report as one HTML file.

A thought is untrusted text: a model sampled it from documents that anybody may have written. It is escaped
everywhere. The HTML loads nothing, and its only script is its own search.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import yaml

from rlpretrain import __version__
from rlpretrain.data.token_text import TokenReader
from rlpretrain.reporting.curves import draw_curves
from rlpretrain.reporting.headline import make_headline
from rlpretrain.reporting.token_gains import CONTROLS, ScoredPosition, ScoredThought
from rlpretrain.tracking.console import printable
from rlpretrain.tracking.health import Health
from rlpretrain.tracking.metrics import METRICS
from rlpretrain.types import Document

LONGEST_TEXT = 20_000
"""Characters of document text between two target tokens that are shown."""


@dataclass
class Report:
    """The contents of a report; `missing` lists what could not be shown, with the reason."""

    title: str
    documents: list[tuple[Document, list[ScoredPosition]]] = field(default_factory=list)
    tokenizer: Any = None
    record: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, float]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    about: str = ""
    others: dict[str, Report] = field(default_factory=dict)
    """Runs to compare with, by name; their documents are not shown."""
    refresh: int | None = None
    """Seconds after which the page loads itself again."""


def gain_colour(gain: float, scale: float) -> str:
    """Blue for a gain above 0, orange below, transparent at 0; colour-blind readers can tell them apart."""
    opacity = min(1.0, abs(gain) / scale) * 0.75
    return f"rgba({'38,119,217' if gain > 0 else '230,115,0'},{opacity:.2f})"


def list_warnings(rows: Sequence[Mapping[str, float]], positions: Sequence[ScoredPosition]) -> list[str]:
    """The warnings of the run (rlpretrain/tracking/health.py), then two about the thoughts that are shown."""
    warnings = [f"Step {finding.step}: {finding.text}" for finding in Health().replay(rows)]
    gains = [t.gain for position in positions for t in position.thoughts if t.gain is not None]
    empty = [position.controls["empty"] for position in positions if "empty" in position.controls]
    if not gains:
        return warnings
    mean_gain = np.mean(gains)
    if mean_gain < -0.05:
        beside = f", an empty one {np.mean(empty):.2f}" if empty else ""
        warnings.append(
            f"Thoughts cost: these gain {mean_gain:.2f} nats on average{beside}: the model predicts "
            "better without."
        )
    if empty and mean_gain > 0.05 and np.mean(empty) > 0.8 * mean_gain:
        warnings.append(
            f"Delimiter only: an empty thought gains {np.mean(empty):.2f} nats, a sampled one "
            f"{mean_gain:.2f}: the words of a thought add little."
        )
    return warnings


def render(report: Report) -> str:
    """The report as HTML."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    positions = [position for _, of_document in report.documents for position in of_document]
    scale = _colour_scale(positions)
    try:
        panels = draw_curves(report.rows, {name: other.rows for name, other in report.others.items()})
    except ImportError:
        panels = []
        report.missing.append('curves: pip install "rlpretrain[plot]"')
    settings = ""
    if config := report.record.get("config"):
        settings = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    documents = []
    if report.documents:
        reader = TokenReader(report.tokenizer)
        documents = [
            _document_values(document, of_document, reader, max(scale, 1e-6))
            for document, of_document in report.documents
        ]
    return environment.get_template("report.html.jinja").render(
        report=report,
        headlines={
            name: make_headline(run.record, run.rows)
            for name, run in {report.title: report, **report.others}.items()
        },
        documents=documents,
        panels=panels,
        warnings=list_warnings(report.rows, positions),
        scale=scale,
        controls=CONTROLS,
        version=__version__,
        last=report.rows[-1] if report.rows else {},
        metrics=METRICS,
        settings=settings,
    )


def _colour_scale(positions: Sequence[ScoredPosition]) -> float:
    """The gain with the full colour: only one in twenty is larger."""
    gains = [
        abs(gain)
        for position in positions
        for thought in position.thoughts
        for gain in thought.gains
        if np.isfinite(gain)
    ]
    return float(np.quantile(gains, 0.95)) if gains else 1.0


def _document_values(
    document: Document, positions: Sequence[ScoredPosition], reader: TokenReader, scale: float
) -> dict[str, Any]:
    """A document for the template: its positions, and its text cut into pieces at the target tokens."""
    tokens = reader(document.token_ids)
    targets: dict[int, tuple[float | None, int]] = {}  # token to (gain, position)
    for k, position in enumerate(positions):
        index, length = position.group.position.index, len(position.group.position.target_ids)
        gains: Sequence[float | None] = position.gains or [None] * max(1, length)
        for j, gain in enumerate(gains):
            if index + j < len(tokens):
                targets.setdefault(index + j, (gain, k))

    def plain_text(start: int, stop: int | None) -> dict[str, Any]:
        text = "".join(token.text for token in tokens[start:stop])
        return {"text": printable(text, LONGEST_TEXT)}

    pieces: list[dict[str, Any]] = []
    start = 0
    for index, (gain, k) in sorted(targets.items()):
        pieces.append(plain_text(start, index))
        text, label = printable(tokens[index].inline), printable(tokens[index].spelled)
        colour = gain_colour(gain or 0.0, scale)
        pieces.append({"text": text, "label": label, "gain": gain, "position": k, "colour": colour})
        start = index + 1
    pieces.append(plain_text(start, None))
    return {
        "id": printable(document.id, 80),
        "pieces": pieces,
        "positions": [_position_values(position, reader, scale) for position in positions],
    }


def _position_values(scored: ScoredPosition, reader: TokenReader, scale: float) -> dict[str, Any]:
    """A position for the template."""
    group, position = scored.group, scored.group.position
    gains = [thought.gain for thought in scored.thoughts if thought.gain is not None]
    target = [token.spelled for token in reader(position.target_ids, after=position.context_ids)]

    def thought_values(scored_thought: ScoredThought) -> dict[str, Any]:
        thought = scored_thought.thought
        tokens = [
            {"text": printable(text, 40), "gain": gain, "colour": gain_colour(gain, scale)}
            for text, gain in zip(target, scored_thought.gains, strict=False)
        ]
        return {
            "text": printable(reader.text(thought.token_ids, after=group.prompt.token_ids)),
            "length": len(thought.token_ids),
            "finish": str(thought.finish_reason),
            "reward": scored_thought.reward,
            "advantage": scored_thought.advantage,
            "gain": scored_thought.gain,
            "tokens": tokens,
        }

    return {
        "index": position.index,
        "role": group.role,
        "gain": float(np.mean(gains)) if gains else None,
        "target": printable("".join(target), 400),
        "controls": scored.controls,
        "count": len(scored.thoughts),
        "thoughts": _counted([thought_values(thought) for thought in scored.thoughts]),
    }


def _counted(thoughts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Equal thoughts in one row, with their `count`, in the order of the first of each."""
    rows: list[dict[str, Any]] = []
    for thought in thoughts:
        same = next((row for row in rows if row | {"count": 0} == thought | {"count": 0}), None)
        if same:
            same["count"] += 1
        else:
            rows.append(thought | {"count": 1})
    return rows
