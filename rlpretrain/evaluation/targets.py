"""Scores the targets of groups, and documents without thoughts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from rlpretrain.scoring.groups import BatchScores, DocumentScores, micro_batches, score_batch
from rlpretrain.scoring.packing import Layout
from rlpretrain.scoring.scorer import Scorer, score_function
from rlpretrain.types import Batch, Document
from rollout.types import Group


@dataclass(frozen=True, slots=True)
class TargetScores:
    """Log p of the target in nats, and hits: 1 if every token of the target is the likeliest.

    Shapes: P groups, up to G thoughts.
    """

    logps: np.ndarray  # [P, G] after each thought
    hits: np.ndarray  # [P, G]
    own_logps: np.ndarray  # [P] without a thought
    own_hits: np.ndarray  # [P]


class KindScores(NamedTuple):
    """Scores of several kinds of thoughts at the same positions, and of the documents without thoughts."""

    kinds: dict[str, TargetScores]
    losses: np.ndarray
    """[P] next-token loss per token of each position's document."""
    tokens: np.ndarray
    """[P] predicted tokens of each position's document; 0 where an earlier position has the same document."""


def score_kinds(
    scorer: Scorer, kinds: Mapping[str, Sequence[Group]], documents: Sequence[Document], layout: Layout
) -> KindScores:
    """Score all kinds of thoughts in one pass, in which they share their context.

    `kinds[name][i]` are groups at one position, whose document is `documents[i]`. Every position has as many
    thoughts of a kind as the first.
    """
    groups = [_merged(of_position) for of_position in zip(*kinds.values(), strict=True)]
    scored = _score(scorer, groups, documents, layout)
    whole = _target_scores(groups, scored)
    parts, first = {}, 0
    for name, of_kind in kinds.items():
        last = first + len(of_kind[0].thoughts)
        parts[name] = replace(whole, logps=whole.logps[:, first:last], hits=whole.hits[:, first:last])
        first = last
    losses, tokens = _losses(documents, scored.documents)
    return KindScores(parts, losses, tokens * is_first(documents))


def score_targets(
    scorer: Scorer, groups: Sequence[Group], documents: Sequence[Document], layout: Layout
) -> TargetScores:
    """Score the targets after every thought, whatever its reward, and without a thought."""
    return _target_scores(groups, _score(scorer, groups, documents, layout))


def no_think(scorer: Scorer, documents: Sequence[Document], layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """Next-token loss per token [D] of each document, and its number of predicted tokens [D]."""
    return _losses(documents, _score(scorer, (), documents, layout).documents)


def document_losses(
    scorer: Scorer, documents: Sequence[Document], layout: Layout
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """`no_think`, behind the numbers of documents that are prompts with answers, by name.

    `answer_loss` [D] is the loss per token of the answer, NaN for a document without one; it is missing if
    none has one.
    """
    scored = _score(scorer, (), documents, layout).documents
    answers = np.full(len(documents), np.nan)
    for i, document in enumerate(documents):
        if document.answer_at is not None:
            logps = scored[document.id].logps[max(0, document.answer_at - 1) :]
            answers[i] = -float(logps.double().mean())
    values = {} if np.isnan(answers).all() else {"answer_loss": answers}
    return values, *_losses(documents, scored)


def is_first(documents: Sequence[Document]) -> np.ndarray:
    """[P] 1 where no earlier position has the same document, else 0."""
    ids = [document.id for document in documents]
    return np.array([id_ not in ids[:i] for i, id_ in enumerate(ids)], float)


def _score(
    scorer: Scorer, groups: Sequence[Group], documents: Sequence[Document], layout: Layout
) -> BatchScores:
    """Scores of targets and documents; log-probs of thoughts, which nobody reads here, are not computed."""
    distinct = {document.id: document for document in documents}
    batch = Batch(tuple(replace(group, rewards=None) for group in groups), tuple(distinct.values()))
    micros = [
        replace(micro, thought_mask=torch.zeros_like(micro.thought_mask))
        for micro in micro_batches(batch, layout)
    ]
    device = next(scorer.parameters()).device
    return score_batch(score_function(scorer, hits=bool(groups)), micros, device)


def _merged(groups: Sequence[Group]) -> Group:
    """One group with the thoughts of all these, which are at one position."""
    return replace(groups[0], thoughts=tuple(thought for group in groups for thought in group.thoughts))


def _target_scores(groups: Sequence[Group], scored: BatchScores) -> TargetScores:
    shape = (len(groups), max(len(group.thoughts) for group in groups))
    scores = TargetScores(np.zeros(shape), np.zeros(shape), np.zeros(shape[0]), np.zeros(shape[0]))
    for i, group in enumerate(groups):
        group_scores, n = scored.groups[group.id], len(group.thoughts)
        scores.logps[i, :n] = group_scores.joint_target.numpy()
        scores.hits[i, :n] = group_scores.target_hits.numpy()
        scores.own_logps[i] = float(group_scores.joint_own[0])
        scores.own_hits[i] = float(group_scores.own_hits[0])
    return scores


def _losses(
    documents: Sequence[Document], scored: Mapping[str, DocumentScores]
) -> tuple[np.ndarray, np.ndarray]:
    logps = [scored[document.id].logps for document in documents]
    losses = np.array([-float(of_document.double().mean()) for of_document in logps])
    return losses, np.array([len(of_document) for of_document in logps], float)
