"""A run as one HTML file: curves, warnings in words, and thoughts with the gain of every target token.

`report` is for a run, finished or not; `inspect` shows the gains of any checkpoint on any text.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rlpretrain.config import ConfigError
from rlpretrain.config.io import build, to_dict
from rlpretrain.files import check_file, writing
from rlpretrain.objectives import parse_section
from rlpretrain.reporting.html import Report, render
from rlpretrain.reporting.thoughts import (
    PARTS,
    Models,
    add_new_thoughts,
    add_stored_thoughts,
    load_model,
    load_models,
)
from rlpretrain.tracking.console import printable
from rlpretrain.tracking.progress import Tick, Ticks, no_tick
from rollout.store import Store, StoreError

LARGEST = 3_000_000
"""Bytes that a report may have; a larger one is written with fewer documents."""


def report(
    folder: str | Path,
    out: str | Path | None = None,
    *,
    step: int | None = None,
    documents: int = 12,
    model: str | None = None,
    against: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write the report of a run folder, by default to `folder`/report.html, and return its path.

    If the run stored its rollouts, the thoughts are those of `step`, by default the last one stored; else
    they are sampled from the trained model. Gains are the trained model's, or `model`'s, against the run's
    base model. Curves and headline of the run `against` stand beside its own. `progress` is called with the
    finished parts of the work and their number. Raises ConfigError if a folder holds no run.
    """
    folder = Path(folder)
    contents = read_run(folder)
    add_other(contents, against)
    check_file(out or folder / "report.html", "--out")
    try:
        add_thoughts(contents, folder, step, documents, model, Ticks(progress, PARTS))
    except (ConfigError, StoreError, OSError, ValueError, KeyError) as error:
        contents.missing.append(f"thoughts: {error}")
    return write_report(contents, Path(out) if out else folder / "report.html")


def inspect(
    model: str,
    text: str,
    out: str | Path,
    *,
    objective: Mapping[str, Any] | None = None,
    documents: int = 12,
    thoughts: int = 4,
    max_thought_tokens: int = 128,
    max_length: int = 512,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write a report of any checkpoint on any text, without a run: where would thinking help this model?"""
    check_file(out, "--out")
    section = {"name": "rlp", "positions": "every_k", "every": 16, "positions_per_document": 8}
    sampling = {"thoughts": max(2, thoughts), "max_thought_tokens": max_thought_tokens, "cut": "force_close"}
    config = build(
        {
            "model": model,
            "data": {"path": text, "max_length": max_length},
            "objective": section | dict(objective or {}),
            "sampling": sampling,
            "seed": seed,
        }
    )
    contents = Report(
        f"{Path(model).name}: where thinking helps",
        about=f"{thoughts} thoughts at each position, sampled now",
    )
    named = ("model", "data", "objective", "sampling", "seed")
    contents.record = {"config": {name: value for name, value in to_dict(config).items() if name in named}}
    live, tokenizer, added = load_model(config, model)
    if added:
        contents.missing.append(
            f"the model has never seen {' and '.join(added)}: their embeddings are untrained"
        )
    add_new_thoughts(contents, config, Models(live, None, tokenizer), documents, Ticks(progress, PARTS))
    return write_report(contents, Path(out))


def read_run(folder: Path) -> Report:
    """run.json and metrics.jsonl of a run, as far as they exist and are complete."""
    contents = Report(folder.name)
    record, log = folder / "run.json", folder / "metrics.jsonl"
    if not record.exists() and not log.exists():
        raise ConfigError(f"{folder} is no run folder: it has neither run.json nor metrics.jsonl")
    try:
        contents.record = json.loads(record.read_text())
        if contents.record.get("status") != "done":
            contents.missing.append(
                f"the end: the run's status is {contents.record.get('status')!r}, at step "
                f"{contents.record.get('step')}"
            )
    except (OSError, ValueError) as error:
        contents.missing.append(f"run.json (settings and versions): {error}")
    for line in log.read_text(errors="replace").splitlines() if log.exists() else []:
        try:
            contents.rows.append(_finite_numbers(json.loads(line)))
        except (ValueError, AttributeError):
            after = len(contents.rows)
            contents.missing.append(f"a line of metrics.jsonl that is not whole, after step {after}")
    if not contents.rows:
        contents.missing.append("metrics.jsonl (curves)")
    return contents


def add_other(contents: Report, folder: str | Path | None) -> None:
    """Add curves and headline of another run; ConfigError if the folder holds none."""
    if folder is None:
        return
    other = read_run(Path(folder))
    name = other.title if other.title != contents.title else str(folder)
    contents.others[printable(name, 80)] = other
    contents.missing += [f"{name}: {text}" for text in other.missing]


def _finite_numbers(row: dict[str, Any]) -> dict[str, float]:
    numbers = {name: float(value) for name, value in row.items() if isinstance(value, int | float)}
    return {name: value for name, value in numbers.items() if math.isfinite(value)}


def add_thoughts(
    contents: Report, folder: Path, step: int | None, documents: int, model: str | None, tick: Tick = no_tick
) -> None:
    """Add the thoughts that a run stored, or else new ones."""
    if not contents.record.get("config"):
        raise ConfigError("run.json has no configuration")
    config = build(_needed_settings(contents.record["config"]))
    if not parse_section(config.objective)[0].has_positions:
        contents.about = "An objective without thoughts."
        return
    loaded = load_models(contents, config, folder, model)
    store = Store(folder / "rollouts")
    if steps := store.steps():
        chosen_step = steps[-1] if step is None else step
        add_stored_thoughts(contents, config, loaded, store, chosen_step, documents, tick)
        return
    if loaded.model is None:
        raise ConfigError(
            "the run stored no rollouts (save_rollouts: true), and there is no model to sample thoughts from"
        )
    contents.about = (
        "The run kept no rollouts (save_rollouts: true keeps them): these thoughts were sampled now, "
        "from the trained model."
    )
    add_new_thoughts(contents, config, loaded, documents, tick)


def _needed_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """The sections that a report reads; an older version may have stored others that are unknown now."""
    needed = ("model", "data", "objective", "sampling", "eval", "seed", "device")
    return {name: values[name] for name in needed if name in values}


def write_report(contents: Report, out: Path) -> Path:
    """Render with as many documents as fit into `LARGEST`, write under a temporary name, then rename."""
    html = render(contents)
    while len(html.encode()) > LARGEST and contents.documents:
        kept = len(contents.documents) // 2
        contents.missing = [item for item in contents.missing if not item.startswith("documents")]
        contents.missing.append(
            f"documents: only {kept} are shown, so that the file stays below {LARGEST // 10**6} MB"
        )
        contents.documents = contents.documents[:kept]
        html = render(contents)
    out.parent.mkdir(parents=True, exist_ok=True)
    work = out.with_name(f".{out.name}.tmp")
    with writing(out):
        work.write_text(html, encoding="utf-8")
        work.replace(out)
    return out
