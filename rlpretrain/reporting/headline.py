"""The headline of a report: what was trained on what, and what changed from first to last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlpretrain.tracking.console import printable

Row = Mapping[str, float]
HELD_OUT: Mapping[str, str] = {
    "eval/gain_frozen": "gain of thoughts",
    "eval/empty": "gain of an empty thought",
    "eval/shuffled": "gain of shuffled thoughts",
    "eval/other": "gain of thoughts of other documents",
    "eval/no_think_loss": "loss without a thought, per token",
}
"""Metrics of a run with held-out documents, and what they are."""
TRAINING: Mapping[str, str] = {
    "ig/frozen": "gain of thoughts",
    "ig/empty": "gain of an empty thought",
    "reward": "reward",
    "ntp/trained_loss": "loss of the trained tokens",
    "ntp/loss": "loss without a thought, per token",
}
"""The same of other runs."""


@dataclass(frozen=True, slots=True)
class Change:
    """A number at the first and at the last measurement; `before` is None where there is only one."""

    label: str
    before: float | None
    after: float


@dataclass(frozen=True, slots=True)
class Headline:
    """What stands at the top of a page."""

    subjects: dict[str, str]
    """Model, data, objective."""
    changes: list[Change]
    measured: str
    """On what, and when."""


def make_headline(record: Mapping[str, Any], rows: Sequence[Row]) -> Headline:
    """The headline of a run, from run.json and metrics.jsonl; without changes if nothing was logged."""
    subjects = _subjects(record.get("config") or {})
    steps = [int(row["step"]) for row in rows if "step" in row and any(name in row for name in HELD_OUT)]
    if steps:
        when = " and ".join(f"step {step}" for step in dict.fromkeys((steps[0], steps[-1])))
        return Headline(subjects, _changes(rows, HELD_OUT, 0), f"In nats, on held-out documents, at {when}.")
    when = "on training documents: means of the first and the last tenth of the steps that log a number"
    return Headline(subjects, _changes(rows, TRAINING, 0.1), f"In nats, {when}.")


def _subjects(config: Mapping[str, Any]) -> dict[str, str]:
    data, model = config.get("data") or {}, config.get("model") or {}
    sources = data.get("sources") or {}
    named = {
        "model": model.get("path"),
        "data": ", ".join(sources) or data.get("path") or data.get("source"),
        "objective": (config.get("objective") or {}).get("name"),
    }
    return {name: printable(str(value), 200) for name, value in named.items() if value}


def _changes(rows: Sequence[Row], names: Mapping[str, str], share: float) -> list[Change]:
    """First and last values of the metrics that were logged, each a mean over a share of its values."""
    changes: dict[str, Change] = {}
    for name, label in names.items():
        values = [row[name] for row in rows if name in row]
        size = max(1, round(share * len(values)))
        if values and label not in changes:
            before = float(np.mean(values[:size])) if len(values) > 1 else None
            changes[label] = Change(label, before, float(np.mean(values[-size:])))
    return list(changes.values())
