"""A run as one HTML page that stands alone: curves, warnings in words, and the thoughts with what each is
worth, token by token.

`report` is for a run, finished or not; `inspect` makes the same heat map for any checkpoint and text. The
page itself is rlpretrain/reporting/html.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from rlpretrain import models
from rlpretrain.config import ConfigError, PretrainConfig
from rlpretrain.config.io import build
from rlpretrain.data.stream import read_all
from rlpretrain.files import check_file, writing
from rlpretrain.objectives import Objective, delimiters, load_objective, parse_section
from rlpretrain.ranks import join
from rlpretrain.reporting.html import Page, render
from rlpretrain.reporting.token_gains import Place, places, rewards_now
from rlpretrain.rollouts.batches import roll_out
from rlpretrain.rollouts.drawing import prepare_held_out
from rlpretrain.scoring.groups import no_think_contexts, token_entropies
from rlpretrain.scoring.packing import Layout
from rlpretrain.scoring.references import Baseline, Frozen, NoBaseline
from rlpretrain.scoring.scorer import Scorer, score_function
from rlpretrain.types import Document
from rollout.hf import HFEngine
from rollout.store import Store, StoreError
from rollout.types import Group

LARGEST = 3_000_000
"""Bytes that a page may have; with more, fewer documents are shown."""


def report(
    folder: str | Path,
    out: str | Path | None = None,
    *,
    step: int | None = None,
    documents: int = 12,
    model: str | None = None,
) -> Path:
    """Write the report of a run folder (to `folder`/report.html by default) and return where it is.

    Thoughts are those of `step` (the last one kept) where the run kept its rollouts, else they are sampled
    now from the trained model; gains are the trained model's, or `model`'s, against the run's base.
    ConfigError if there is nothing of a run there.
    """
    folder = Path(folder)
    page = read(folder)
    check_file(out or folder / "report.html", "--out")
    try:
        _thoughts(page, folder, step, documents, model)
    except (ConfigError, StoreError, OSError, ValueError, KeyError) as error:
        page.missing.append(f"thoughts: {error}")
    return _write(page, Path(out) if out else folder / "report.html")


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
) -> Path:
    """The same heat map for any checkpoint and text, without a run: where would thinking help this model?"""
    check_file(out, "--out")
    section = {"name": "rlp", "positions": "every_k", "every": 16, "positions_per_document": 8} | dict(
        objective or {}
    )
    config = build(
        {
            "model": model,
            "data": {"path": text, "max_length": max_length},
            "objective": section,
            "seed": seed,
            "sampling": {
                "thoughts": max(2, thoughts),
                "max_thought_tokens": max_thought_tokens,
                "cut": "force_close",
            },
        }
    )
    page = Page(
        f"{Path(model).name}: where thinking helps",
        about=f"{thoughts} thoughts at each position, sampled now",
    )
    live, tokenizer, added = _load(config, model)
    if added:
        page.missing.append(f"the model has never seen {' and '.join(added)}: their embeddings are untrained")
    _fresh(page, config, live, None, tokenizer, documents)
    return _write(page, Path(out))


def read(folder: Path) -> Page:
    """run.json and metrics.jsonl of a run, as far as they are there and whole."""
    page = Page(f"{folder.name}")
    record, log = folder / "run.json", folder / "metrics.jsonl"
    if not record.exists() and not log.exists():
        raise ConfigError(f"{folder} is no run folder: it has neither run.json nor metrics.jsonl")
    try:
        page.record = json.loads(record.read_text())
        if page.record.get("status") != "done":
            page.missing.append(
                f"the end: the run's status is {page.record.get('status')!r}, at step "
                f"{page.record.get('step')}"
            )
    except (OSError, ValueError) as error:
        page.missing.append(f"run.json (settings and versions): {error}")
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    for line in lines:
        try:
            row = json.loads(line)
            page.rows.append(
                {k: float(v) for k, v in row.items() if isinstance(v, int | float) and math.isfinite(v)}
            )
        except (ValueError, AttributeError):
            page.missing.append(f"a line of metrics.jsonl that is not whole, behind step {len(page.rows)}")
    if not page.rows:
        page.missing.append("metrics.jsonl (curves)")
    return page


def _thoughts(page: Page, folder: Path, step: int | None, documents: int, model: str | None) -> None:
    if not page.record.get("config"):
        raise ConfigError("run.json has no configuration")
    config = build(_known(page.record["config"]))
    if not parse_section(config.objective)[0].has_positions:
        page.about = "An objective without thoughts."
        return
    trained = Path(model) if model else folder / "model"
    live = reference = tokenizer = None
    try:
        if not trained.exists() and model is None:
            raise ConfigError(f"{trained} is written when a run ends (--model takes another)")
        live, tokenizer, _ = _load(config, str(trained))
        reference = _load(config, config.model.path)[0]
    except ConfigError as error:
        page.missing.append(
            f"{'the base, so gains are against the model itself' if live else 'the model, so no gains'}: "
            f"{error}"
        )
        tokenizer = tokenizer or models.load_tokenizer(config.model)
    store = Store(folder / "rollouts")
    if not store.steps():
        if live is None:
            raise ConfigError(
                "the run kept no rollouts (save_rollouts: true), and there is no model to sample some from"
            )
        page.about = (
            "The run kept no rollouts (save_rollouts: true keeps them): these thoughts were sampled now, "
            "from the trained model."
        )
        _fresh(page, config, live, reference, tokenizer, documents)
        return
    step = store.steps()[-1] if step is None else step
    groups, known, _ = store.read(step)
    page.about = (
        f"The thoughts of step {step}, as they were sampled; gains are those of the model as it is now."
    )
    kept = {document.id: document for document in known}
    ids = list(dict.fromkeys(g.position.document_id for g in groups))[:documents]
    objective = load_objective(config, tokenizer)
    _fill(
        page,
        [g for g in groups if g.position.document_id in ids],
        kept,
        objective,
        live,
        reference,
        tokenizer,
        config,
    )


def _fresh(
    page: Page,
    config: PretrainConfig,
    live: nn.Module,
    reference: nn.Module | None,
    tokenizer: Any,
    documents: int,
) -> None:
    """Thoughts sampled now, at the objective's places in the first documents of the data."""
    objective = load_objective(config, tokenizer)
    found = read_all(
        replace(config.data, path=config.eval.data or config.data.path, streaming=False),
        tokenizer,
        limit=documents,
    )
    prepared = [prepare_held_out(objective, document, config.seed) for document in found]
    found = [document for document in prepared if document is not None]
    chosen, seeds, rng = [], [], np.random.default_rng(config.seed)
    for document in found:
        entropies = None
        if "entropy" in objective.needs:
            score = score_function(Scorer(live), entropies=True)
            (entropies,) = token_entropies(score, [document], 16384, next(live.parameters()).device)
        places_ = objective.positions(document, rng, entropies)
        chosen += places_
        seeds += [int(rng.integers(2**62)) for _ in places_]
    if not chosen:
        raise ConfigError(f"none of the first {len(prepared)} documents has a position for this objective")
    groups = roll_out(objective, HFEngine(live, tokenizer=tokenizer), chosen, seeds)
    _fill(page, groups, {d.id: d for d in found}, objective, live, reference, tokenizer, config)


def _fill(
    page: Page,
    groups: Sequence[Group],
    known: Mapping[str, Document],
    objective: Objective,
    live: nn.Module | None,
    reference: nn.Module | None,
    tokenizer: Any,
    config: PretrainConfig,
) -> None:
    arms, pad_id = no_think_contexts(objective, groups), tokenizer.pad_token_id or 0
    rewarded: dict[str, list[float]] = {}
    unknown = [g for g in groups if g.rewards is None]
    if live is not None and unknown and "target" in objective.needs and "batch" not in objective.needs:
        against = (page.record.get("config") or {}).get("baseline", {}).get("name", "self")
        first = reference if reference is not None and against in ("frozen", "ema") else None
        baseline = Frozen(first) if first is not None else NoBaseline() if against == "none" else Baseline()
        layout = Layout(
            16384, config.sampling.cut, config.sampling.cut_penalty, pad_id=pad_id, no_think_ids=arms
        )
        there = [known[i] for i in dict.fromkeys(g.position.document_id for g in unknown) if i in known]
        rewarded = rewards_now(objective, live, baseline, unknown, there, layout)
    found = places(
        groups, known, model=live, reference=reference, no_think=arms, rewarded=rewarded, pad_id=pad_id
    )
    page.tokenizer = tokenizer
    by_document: dict[str, list[Place]] = {}
    for place in found:
        by_document.setdefault(place.group.position.document_id, []).append(place)
    for name, there in by_document.items():
        position = max((p.group.position for p in there), key=lambda p: p.index)
        whole = known.get(name) or Document(name, (*position.context_ids, *position.target_ids))
        page.documents.append((whole, sorted(there, key=lambda p: p.group.position.index)))


def _load(config: PretrainConfig, path: str) -> tuple[nn.Module, Any, list[str]]:
    start = replace(config.model, path=path, from_scratch=False)
    if path != config.model.path:
        start = replace(start, quantization="none")  # a trained model was saved merged
    model, tokenizer, added = models.load_with_tokenizer(start, delimiters(config.objective), config.seed)
    return model.to(join(config.device).device), tokenizer, added


def _known(values: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of a stored configuration that a report needs, whatever else an older version wrote."""
    wanted = ("model", "data", "objective", "sampling", "eval", "seed", "device")
    return {k: values[k] for k in wanted if k in values}


def _write(page: Page, out: Path) -> Path:
    """Render, with fewer documents until it fits; write aside, then rename."""
    html = render(page)
    while len(html.encode()) > LARGEST and page.documents:
        kept = len(page.documents) // 2
        page.missing = [m for m in page.missing if not m.startswith("documents")]
        page.missing.append(
            f"documents: only {kept} are shown, so that the page stays below {LARGEST // 10**6} MB"
        )
        page.documents = page.documents[:kept]
        html = render(page)
    out.parent.mkdir(parents=True, exist_ok=True)
    work = out.with_name(f".{out.name}.tmp")
    with writing(out):
        work.write_text(html, encoding="utf-8")
        work.replace(out)
    return out
