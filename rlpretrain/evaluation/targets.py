"""Scores the targets of groups, and documents without thoughts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from rlpretrain.scoring.groups import micro_batches, score_batch
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


def score_targets(
    scorer: Scorer, groups: Sequence[Group], documents: Sequence[Document], layout: Layout
) -> TargetScores:
    """Score the targets after every thought, whatever its reward, and without a thought."""
    shape = (len(groups), max(len(group.thoughts) for group in groups))
    scores = TargetScores(np.zeros(shape), np.zeros(shape), np.zeros(shape[0]), np.zeros(shape[0]))
    unrewarded = tuple(replace(group, rewards=None) for group in groups)
    batch = Batch(unrewarded, _distinct(documents))
    device = next(scorer.parameters()).device
    scored = score_batch(score_function(scorer, hits=True), micro_batches(batch, layout), device).groups
    for i, group in enumerate(groups):
        group_scores, n = scored[group.id], len(group.thoughts)
        scores.logps[i, :n] = group_scores.joint_target.numpy()
        scores.hits[i, :n] = group_scores.target_hits.numpy()
        scores.own_logps[i] = float(group_scores.joint_own[0])
        scores.own_hits[i] = float(group_scores.own_hits[0])
    return scores


def no_think(scorer: Scorer, documents: Sequence[Document], layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """Next-token loss per token [D] of each document, and its number of predicted tokens [D]."""
    device = next(scorer.parameters()).device
    batch = Batch((), _distinct(documents))
    scored = score_batch(score_function(scorer), micro_batches(batch, layout), device).documents
    logps = [scored[document.id].logps for document in documents]
    losses = np.array([-float(of_document.double().mean()) for of_document in logps])
    return losses, np.array([len(of_document) for of_document in logps], float)


def _distinct(documents: Sequence[Document]) -> tuple[Document, ...]:
    """Each document once."""
    return tuple({document.id: document for document in documents}.values())
