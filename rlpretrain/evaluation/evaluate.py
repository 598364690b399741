"""What thinking is worth on held-out text: gain, controls, no-think loss, and accuracy.

Every number is per position; `summary` gives means with 95% intervals over whole source rows
(rlpretrain/evaluation/intervals.py). A thought that did not close itself gets a close tag here, and counts in
`unclosed`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from rlpretrain.config import ConfigError, PretrainConfig
from rlpretrain.data.stream import read_all
from rlpretrain.evaluation.contrast import CONTROLS, contrast
from rlpretrain.evaluation.record import MEANING, Evaluation, by_meta
from rlpretrain.evaluation.targets import TargetScores, no_think, score_targets
from rlpretrain.models.lengths import check_rows, limit_of
from rlpretrain.objectives import Objective
from rlpretrain.rollouts.batches import roll_out
from rlpretrain.rollouts.drawing import document_number, prepare_held_out
from rlpretrain.scoring.groups import no_think_contexts, token_entropies
from rlpretrain.scoring.packing import Layout
from rlpretrain.scoring.scorer import Scorer, score_function
from rlpretrain.types import Document
from rollout.hf import HFEngine
from rollout.types import FinishReason, Group, Position

__all__ = [
    "MEANING",
    "Evaluation",
    "TargetScores",
    "by_meta",
    "contrast",
    "evaluate",
    "held_out",
    "no_think",
    "score_targets",
]


@dataclass(slots=True)
class Sample:
    """The documents that are evaluated, the position in each, and the seed of its thoughts."""

    documents: list[Document]
    positions: list[Position]
    seeds: list[int]


def evaluate(
    model: nn.Module,
    objective: Objective,
    documents: Sequence[Document],
    *,
    frozen: nn.Module | None = None,
    thoughts: int = 4,
    seed: int = 0,
    token_budget: int = 16384,
    controls: bool = True,
    greedy: bool = True,
    pad_id: int = 0,
) -> Evaluation:
    """Evaluate `model` at the first of the objective's positions in each document.

    `frozen` is a model, or a scorer of one, whose no-think log-probabilities `gain_frozen` is measured
    against; by default `model`. Positions and thoughts depend only on `seed` and the document's id, not on
    the number of ranks or the order of documents.
    """
    prepared = [prepare_held_out(objective, document, seed) for document in documents]
    documents = [document for document in prepared if document is not None]
    check_rows(objective, max((len(d.token_ids) for d in documents), default=0), limit_of(model))
    scorer = Scorer(model)
    reference = frozen if isinstance(frozen, Scorer) else Scorer(model if frozen is None else frozen)
    layout = Layout(token_budget, cut="force_close", pad_id=pad_id)
    entropies: Sequence[Any] = [None] * len(documents)
    if "entropy" in objective.needs:  # of the frozen model, so that the positions do not depend on `model`
        device = next(reference.parameters()).device
        score = score_function(reference, entropies=True)
        entropies = token_entropies(score, documents, token_budget, device)
    sample = _choose_positions(objective, documents, entropies, seed)
    losses, tokens = no_think(scorer, sample.documents, layout)
    if not objective.has_positions:
        return Evaluation({}, sample.documents, losses, tokens, [])

    engine = HFEngine(model, tokenizer=objective.tokenizer)
    prompts = [objective.prompt(position) for position in sample.positions]
    rolled_out = _roll_out(objective, engine, sample, thoughts)
    groups = [group for group in rolled_out if group.parent_id is None]
    values = _sampled_numbers(groups, [group for group in rolled_out if group.parent_id is not None])
    if "target" not in objective.needs:
        return Evaluation(values, sample.documents, losses, tokens, groups)

    layout = replace(layout, no_think_ids=no_think_contexts(objective, groups))
    context = (sample.documents, layout)
    sampled = score_targets(scorer, groups, *context)
    if frozen is None:
        base_logps = sampled.own_logps
    else:  # the thought does not matter, only the arm without one
        base_logps = score_targets(reference, contrast(groups, "empty"), *context).own_logps
    values |= {
        "think_sampled": sampled.hits.mean(1),
        "direct": sampled.own_hits,
        "gain": sampled.logps.mean(1) - sampled.own_logps,
        "gain_frozen": sampled.logps.mean(1) - base_logps,
    }
    if greedy:
        params = replace(objective.setting.params, temperature=0.0)
        best = asyncio.run(engine.sample(prompts, params, 1, sample.seeds))
        greedy_groups = [replace(g, thoughts=tuple(t)) for g, t in zip(groups, best, strict=True)]
        values["think_greedy"] = score_targets(scorer, greedy_groups, *context).hits.mean(1)
    if controls:
        if len({document.id for document in sample.documents}) < 2:
            raise ConfigError(
                "thoughts of another document need two held-out documents with a position, there is one"
            )
        for kind in CONTROLS:
            control = score_targets(scorer, contrast(groups, kind, seed), *context)
            values[kind] = control.logps.mean(1) - base_logps
    return Evaluation(values, sample.documents, losses, tokens, groups)


def _choose_positions(
    objective: Objective, documents: Sequence[Document], entropies: Sequence[Any], seed: int
) -> Sample:
    """The documents with a position, or all of them if the objective has no positions."""
    sample = Sample([], [], [])
    for document, of_document in zip(documents, entropies, strict=True):
        rng = np.random.default_rng((seed, document_number(document.id)))
        positions = objective.positions(document, rng, of_document) if objective.has_positions else []
        if positions or not objective.has_positions:
            sample.documents.append(document)
            sample.positions += positions[:1]
            sample.seeds.append(int(rng.integers(2**62)))
    if not sample.documents:
        raise ConfigError(
            f"none of the {len(documents)} held-out documents has a position for this objective"
        )
    return sample


def _roll_out(objective: Objective, engine: HFEngine, sample: Sample, thoughts: int) -> list[Group]:
    """The objective's groups with `thoughts` thoughts each."""
    changed = objective.with_setting(replace(objective.setting, thoughts=thoughts))
    return roll_out(changed, engine, sample.positions, sample.seeds)


def _sampled_numbers(groups: Sequence[Group], children: Sequence[Group]) -> dict[str, np.ndarray]:
    """Numbers that need no log-probabilities; `children` are the groups that `groups` asked for."""
    lengths = [[len(thought.token_ids) for thought in group.thoughts] for group in groups]
    unclosed = [[t.finish_reason is not FinishReason.CLOSE for t in group.thoughts] for group in groups]
    values = {"unclosed": np.array(unclosed, float).mean(1), "length": np.array(lengths, float).mean(1)}
    if groups[0].rewards is not None:
        values["reward"] = np.array([_mean_reward(group.rewards or ()) for group in groups])
    asked: dict[str, list[float]] = {group.id: [] for group in groups}
    for child in children:
        assert child.parent_id is not None, "a child names its parent"
        asked[child.parent_id] += child.rewards or ()
    if any(asked.values()):
        values["asked"] = np.array([_mean_reward(asked[group.id] or (0.0,)) for group in groups])
    return values


def _mean_reward(rewards: Sequence[float]) -> float:
    """Mean of the finite rewards; NaN, which no mean includes, if there are none."""
    known = [reward for reward in rewards if np.isfinite(reward)]
    return float(np.mean(known)) if known else float("nan")


def held_out(
    config: PretrainConfig, tokenizer: Any, objective: Objective, ranks: int
) -> list[Document] | None:
    """The documents of `eval.data`; ConfigError if they have too few positions to be evaluated."""
    path = config.eval.data
    if not path:
        return None
    data = replace(config.data, path=path, name=None, split="train", streaming=False)
    documents = read_all(data, tokenizer, limit=config.eval.documents)
    usable = [_is_usable(objective, document, config.seed) for document in documents]
    if min(sum(usable[rank::ranks]) for rank in range(ranks)) < 2:
        raise ConfigError(
            f"eval.data {path}: {sum(usable)} of {len(documents)} documents can be used (have a position); "
            "evaluation needs 2 for each rank"
        )
    return documents


def _is_usable(objective: Objective, document: Document, seed: int) -> bool:
    """Whether the prepared document has a position; entropies are not known yet, so they count as 0."""
    prepared = prepare_held_out(objective, document, seed)
    if prepared is None:
        return False
    if not objective.has_positions:
        return True
    entropies = torch.zeros(len(prepared.token_ids))
    return bool(objective.positions(prepared, np.random.default_rng(seed), entropies))
