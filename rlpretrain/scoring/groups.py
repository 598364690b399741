"""Pack groups, score them, and give the scores of each group: the only place that does so.

The training loop takes its micro-batches from here and keeps their graphs. Evaluation, entropies, report and
TRL take numbers. Legend: see rlpretrain/types.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from rlpretrain.objectives.base import Objective
from rlpretrain.ranks import Ranks
from rlpretrain.scoring.packing import Layout, count, idle, joined, pack
from rlpretrain.types import Batch, Document, MicroBatch, Scores, Totals
from rollout.types import Group

ScoreFunction = Callable[[MicroBatch], Scores]
"""What scores a micro-batch: a policy's `score`, or a model's (`scorer.score_function`)."""


@dataclass(frozen=True, slots=True)
class GroupScores:
    """A model's log-probs (nats) of one group, without gradient and on the CPU."""

    group: Group
    thought_logps: Tensor
    """[G, L] at the sampling temperature; 0 after a thought's end and where it is not counted."""
    target_logps: Tensor  # [G, T] of each target token after the thought
    baseline_logps: Tensor  # [T] without a thought, by the reference where there is one
    joint_target: Tensor  # [G] float64, of the whole target after each thought
    joint_baseline: Tensor  # [G] float64, without a thought, by the reference where there is one
    joint_own: Tensor  # [G] float64, without a thought, by the model that is scored
    target_hits: Tensor  # [G] bool: each target token is the likeliest; False unless `Scores` has hits
    own_hits: Tensor  # [G] bool, the same without a thought
    rewards: Tensor  # [G] float64, NaN where a thought does not count and where no objective was given


@dataclass(frozen=True, slots=True)
class DocumentScores:
    """A model's log-probs of one document, without gradient and on the CPU."""

    document: Document
    logps: Tensor  # [tokens - 1] nats, of every token but the first
    entropies: Tensor | None  # [tokens - 1] nats, of the same predictions; None unless `Scores` has them


@dataclass(frozen=True, slots=True)
class BatchScores:
    """A model's scores of a batch, by the ids of its groups and documents."""

    groups: dict[str, GroupScores]
    documents: dict[str, DocumentScores]


def micro_batches(
    batch: Batch, layout: Layout, ranks: Ranks | None = None, totals: Totals | None = None
) -> list[MicroBatch]:
    """The micro-batches of a batch, by default with its own denominators.

    With `ranks` there are as many on every rank, the last of them idle; then all ranks call it together.
    """
    micros = list(pack(batch, layout, totals or count(batch, layout.cut)))
    if ranks is not None:
        most = int(ranks.max([float(len(micros))])[0])
        micros += [idle(layout.pad_id)] * (most - len(micros))
    return micros


@torch.no_grad()
def score_batch(
    score: ScoreFunction,
    micros: Sequence[MicroBatch],
    device: torch.device,
    *,
    reference: Callable[[Scores, MicroBatch], Scores] | None = None,
    objective: Objective | None = None,
) -> BatchScores:
    """The scores of every group and document of the micro-batches, the parts of a split group joined.

    `reference` replaces the no-think log-probs, as a baseline does. With an `objective` the scores include
    its rewards.
    """
    joined_scores = BatchScores({}, {})
    for micro in micros:
        micro = micro.to(device)
        own = score(micro)
        scores = own if reference is None else reference(own, micro)
        rewards = None
        if objective is not None and micro.groups:
            rewards = compute_rewards(objective, micro, scores)
        for part in _groups_of(micro, own, scores, rewards):
            before = joined_scores.groups.get(part.group.id)
            joined_scores.groups[part.group.id] = part if before is None else _join(before, part)
        for document_scores in _documents_of(micro, own):
            joined_scores.documents[document_scores.document.id] = document_scores
    return joined_scores


def token_entropies(
    score: ScoreFunction,
    documents: Sequence[Document],
    token_budget: int,
    device: torch.device,
    ranks: Ranks | None = None,
) -> list[Tensor]:
    """For each document, the entropies (nats) of a model's predictions of its tokens; 0 for the first.

    `score` must give entropies; ValueError if it does not. With `ranks` all call it together, as
    `micro_batches`.
    """
    micros = micro_batches(Batch((), documents), Layout(token_budget), ranks)
    scores = score_batch(score, micros, device).documents
    out = []
    for document in documents:
        entropies = scores[document.id].entropies
        if entropies is None:
            raise ValueError("token_entropies needs a score function that gives entropies")
        out.append(torch.cat([entropies.new_zeros(1), entropies]))
    return out


def compute_rewards(objective: Objective, micro: MicroBatch, scores: Scores) -> Tensor:
    """Rewards [B, G] minus the penalties of the cut-off policy.

    NaN where a thought does not count or its reward does not apply.
    """
    reward = objective.reward(micro.groups, scores.detached()) - micro.penalty
    return reward.masked_fill(~micro.counted, math.nan)


def rows_by_group(micros: Sequence[MicroBatch], values: Sequence[Tensor]) -> dict[str, Tensor]:
    """{group id: its rows [G, ...]} of values [B, G, ...], one tensor for each micro-batch.

    The parts of a split group are joined.
    """
    rows_of: dict[str, Tensor] = {}
    for micro, value in zip(micros, values, strict=True):
        for group, rows in zip(micro.groups, value, strict=True):
            own, before = rows[: len(group.thoughts)], rows_of.get(group.id)
            rows_of[group.id] = own if before is None else torch.cat([before, own])
    return rows_of


def whole_groups(micros: Sequence[MicroBatch]) -> dict[str, Group]:
    """{group id: the group}, the parts of a split group joined."""
    groups: dict[str, Group] = {}
    for micro in micros:
        for group in micro.groups:
            before = groups.get(group.id)
            groups[group.id] = group if before is None else joined(before, group)
    return groups


def no_think_contexts(objective: Objective, groups: Sequence[Group]) -> dict[str, tuple[int, ...]]:
    """{group id: the context of its no-think arm}, where that is not the document; `Layout.no_think_ids`."""
    contexts = {group.id: objective.no_think(group.position) for group in groups}
    return {id_: context for id_, context in contexts.items() if context is not None}


def _groups_of(
    micro: MicroBatch, own: Scores, scores: Scores, rewards: Tensor | None
) -> Iterator[GroupScores]:
    """The scores of the groups, or parts of groups, of one micro-batch.

    `own` are the model's scores, `scores` those after `reference`.
    """
    mask = micro.target_mask
    joint_target = (scores.target_logps * mask[:, None]).sum(-1).double()
    joint_baseline = (scores.baseline_logps * mask).sum(-1).double()
    joint_own = (own.baseline_logps * mask).sum(-1).double()
    hits = joint_target.new_zeros(joint_target.shape, dtype=torch.bool)
    own_hits = joint_own.new_zeros(joint_own.shape, dtype=torch.bool)
    if scores.target_hits is not None and scores.baseline_hits is not None:
        hits = (~mask[:, None] | scores.target_hits).all(-1)
        own_hits = (~mask | scores.baseline_hits).all(-1)
    if rewards is None:
        rewards = torch.full_like(joint_target, math.nan)
    thoughts, targets = scores.thought_logps.cpu(), scores.target_logps.cpu()
    baselines = scores.baseline_logps.cpu()
    joint_target, joint_baseline, joint_own = joint_target.cpu(), joint_baseline.cpu(), joint_own.cpu()
    hits, own_hits, rewards = hits.cpu(), own_hits.cpu(), rewards.double().cpu()
    for b, group in enumerate(micro.groups):
        n = len(group.thoughts)
        tokens = len(group.position.target_ids) if mask.shape[1] else 0
        longest = max((len(thought.token_ids) for thought in group.thoughts), default=0)
        yield GroupScores(
            group,
            thought_logps=thoughts[b, :n, :longest],
            target_logps=targets[b, :n, :tokens],
            baseline_logps=baselines[b, :tokens],
            joint_target=joint_target[b, :n],
            joint_baseline=joint_baseline[b].expand(n),
            joint_own=joint_own[b].expand(n),
            target_hits=hits[b, :n],
            own_hits=own_hits[b].expand(n),
            rewards=rewards[b, :n],
        )


def _documents_of(micro: MicroBatch, scores: Scores) -> Iterator[DocumentScores]:
    """The scores of the documents of one micro-batch whose next-token loss is taken there."""
    sizes = [len(document.token_ids) - 1 for document in micro.documents]
    logps = scores.trunk_logps.cpu().split(sizes)
    entropies: Sequence[Tensor | None] = [None] * len(sizes)
    if scores.trunk_entropies is not None:
        entropies = scores.trunk_entropies.cpu().split(sizes)
    for document, own, entropy in zip(micro.documents, logps, entropies, strict=True):
        yield DocumentScores(document, own, entropy)


def _join(first: GroupScores, second: GroupScores) -> GroupScores:
    """Two parts of one group, in the order of their thoughts."""
    longest = max(first.thought_logps.shape[1], second.thought_logps.shape[1])
    widened = [
        torch.nn.functional.pad(part.thought_logps, (0, longest - part.thought_logps.shape[1]))
        for part in (first, second)
    ]
    by_thought: Mapping[str, Tensor] = {
        field.name: torch.cat([getattr(first, field.name), getattr(second, field.name)])
        for field in fields(GroupScores)
        if field.name not in ("group", "thought_logps", "baseline_logps")
    }
    return replace(
        first, group=joined(first.group, second.group), thought_logps=torch.cat(widened), **by_thought
    )
