"""The thoughts of a report: those that a run stored, or new ones, with their gains and rewards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from rlpretrain import models
from rlpretrain.config import ConfigError, DataConfig, PretrainConfig
from rlpretrain.data.stream import read_all
from rlpretrain.evaluation.places import held_out_data
from rlpretrain.objectives import Objective, delimiters, load_objective
from rlpretrain.ranks import join
from rlpretrain.reporting.html import Report
from rlpretrain.reporting.token_gains import PASSES, ScoredPosition, rewards_now, score_positions
from rlpretrain.rollouts.batches import roll_out
from rlpretrain.rollouts.drawing import prepare_held_out
from rlpretrain.scoring.groups import no_think_contexts, token_entropies
from rlpretrain.scoring.packing import Layout
from rlpretrain.scoring.references import Baseline, Frozen, NoBaseline
from rlpretrain.scoring.scorer import Scorer, score_function
from rlpretrain.tracking.progress import Tick, no_tick
from rlpretrain.types import Document
from rollout.hf import HFEngine
from rollout.store import Store
from rollout.types import Group, Position

TOKEN_BUDGET = 16384
PARTS = PASSES + 2
"""Of the work on thoughts, at each of which `tick` is called: sampling, rewards, and the passes for gains."""


@dataclass(frozen=True, slots=True)
class Models:
    """The models of a report; gains are against `reference`, or against `model` itself if it is None."""

    model: nn.Module | None
    reference: nn.Module | None
    tokenizer: Any


def load_models(report: Report, config: PretrainConfig, folder: Path, model: str | None) -> Models:
    """The trained model of a run, or `model`, and the run's base model, as far as they can be loaded."""
    trained = Path(model) if model else folder / "model"
    live = tokenizer = None
    try:
        if not trained.exists() and model is None:
            raise ConfigError(f"{trained} is written when a run ends (--model takes another)")
        live, tokenizer, _ = load_model(config, str(trained))
        return Models(live, load_model(config, config.model.path)[0], tokenizer)
    except ConfigError as error:
        if live is None:
            report.missing.append(f"the model, so no gains: {error}")
            return Models(None, None, models.load_tokenizer(config.model))
        report.missing.append(f"the base model, so gains are against the model itself: {error}")
        return Models(live, None, tokenizer)


def load_model(config: PretrainConfig, path: str) -> tuple[nn.Module, Any, list[str]]:
    """The model at `path` with the run's settings, its tokenizer, and the tags that were added to both."""
    initial = path == config.model.path
    start = replace(config.model, from_scratch=False) if initial else config.model.saved_at(path)
    model, tokenizer, added = models.load_with_tokenizer(start, delimiters(config.objective), config.seed)
    return model.to(join(config.device).device), tokenizer, added


def add_stored_thoughts(
    report: Report,
    config: PretrainConfig,
    loaded: Models,
    store: Store,
    step: int,
    documents: int,
    tick: Tick = no_tick,
) -> None:
    """Add the thoughts that a run stored at a step, of its first documents."""
    groups, stored_documents, _ = store.read(step)
    report.about = (
        f"The thoughts of step {step}, as they were sampled; gains are those of the model as it is now."
    )
    ids = list(dict.fromkeys(group.position.document_id for group in groups))[:documents]
    chosen = [group for group in groups if group.position.document_id in ids]
    objective = load_objective(config, loaded.tokenizer)
    _add_groups(report, config, loaded, objective, chosen, {d.id: d for d in stored_documents}, tick)


def add_new_thoughts(
    report: Report, config: PretrainConfig, loaded: Models, documents: int, tick: Tick = no_tick
) -> None:
    """Sample thoughts at the objective's positions in a random sample of the data, and add them."""
    model = loaded.model
    assert model is not None, "thoughts are sampled from a model"
    objective = load_objective(config, loaded.tokenizer)
    data = _documents_to_show(config)
    read = read_all(data, loaded.tokenizer, limit=documents, seed=0)
    prepared = [prepare_held_out(objective, document, config.seed) for document in read]
    first_documents = [document for document in prepared if document is not None]
    positions: list[Position] = []
    seeds: list[int] = []
    rng = np.random.default_rng(config.seed)
    for document in first_documents:
        entropies = None
        if "entropy" in objective.needs:
            score = score_function(Scorer(model), entropies=True)
            device = next(model.parameters()).device
            (entropies,) = token_entropies(score, [document], TOKEN_BUDGET, device)
        chosen = objective.positions(document, rng, entropies)
        positions += chosen
        seeds += [int(rng.integers(2**62)) for _ in chosen]
    if not positions:
        raise ConfigError(f"none of {len(read)} documents has a position for this objective")
    groups = roll_out(objective, HFEngine(model, tokenizer=loaded.tokenizer), positions, seeds)
    tick()
    _add_groups(report, config, loaded, objective, groups, {d.id: d for d in first_documents}, tick)


def _documents_to_show(config: PretrainConfig) -> DataConfig:
    """Held-out documents, else those of training; of several sources the first with thoughts."""
    held_out, sources = held_out_data(config), config.data.sources
    thinking = [name for name, source in sources.items() if source.use == "think"]
    name = next((name for name in thinking if not held_out or name in held_out), "")
    if held_out:
        return held_out.get(name) or next(iter(held_out.values()))
    return replace(sources[name].texts() if sources else config.data, streaming=False)


def _add_groups(
    report: Report,
    config: PretrainConfig,
    loaded: Models,
    objective: Objective,
    groups: Sequence[Group],
    documents: Mapping[str, Document],
    tick: Tick,
) -> None:
    """Score groups and add them to the report, by document."""
    layout = Layout(
        TOKEN_BUDGET,
        config.sampling.cut,
        config.sampling.cut_penalty,
        pad_id=loaded.tokenizer.pad_token_id or 0,
        no_think_ids=no_think_contexts(objective, groups),
    )
    rewarded: dict[str, list[float]] = {}
    unrewarded = [group for group in groups if group.rewards is None]
    # not by a reward that compares a batch, or needs a model that only a run has
    only_in_a_run = {"batch", "reference", "target_baseline"}
    can_be_rewarded = "target" in objective.needs and not only_in_a_run & objective.needs
    if loaded.model is not None and unrewarded and can_be_rewarded:
        ids = dict.fromkeys(group.position.document_id for group in unrewarded)
        known = [documents[document_id] for document_id in ids if document_id in documents]
        baseline = _baseline(report, loaded)
        rewarded = rewards_now(objective, loaded.model, baseline, unrewarded, known, layout)
        tick()
    scored = score_positions(
        groups,
        documents,
        model=loaded.model,
        reference=loaded.reference,
        no_think=layout.no_think_ids,
        rewarded=rewarded,
        pad_id=layout.pad_id,
        tick=tick,
    )
    report.tokenizer = loaded.tokenizer
    by_document: dict[str, list[ScoredPosition]] = {}
    for position in scored:
        by_document.setdefault(position.group.position.document_id, []).append(position)
    for document_id, positions in by_document.items():
        positions.sort(key=lambda position: position.group.position.index)
        last = max((position.group.position for position in positions), key=lambda p: p.index)
        text = documents.get(document_id) or Document(document_id, (*last.context_ids, *last.target_ids))
        report.documents.append((text, positions))


def _baseline(report: Report, loaded: Models) -> Baseline:
    """The run's baseline; an EMA is not kept, so the base model takes its place."""
    name = (report.record.get("config") or {}).get("baseline", {}).get("name", "self")
    if loaded.reference is not None and name in ("frozen", "ema"):
        return Frozen(loaded.reference)
    return NoBaseline() if name == "none" else Baseline()
