"""Pack groups and documents into micro-batches of at most `token_budget` tokens.

A group is split over micro-batches only if it is larger than the budget. A document that was drawn twice
counts twice. Legend: see rlpretrain/types.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from rlpretrain.scoring.layout import Layout, Unit, idle, lay_out, target_of, token_mean
from rlpretrain.scoring.trunks import Trunks
from rlpretrain.scoring.unclosed import use_of_thought
from rlpretrain.tree import shared_prefix_length
from rlpretrain.types import Batch, Document, MicroBatch, Totals
from rollout.types import Group, Thought

__all__ = [
    "Layout",
    "Unit",
    "cost",
    "count",
    "families",
    "idle",
    "is_counted",
    "joined",
    "pack",
    "stored_rewards",
    "token_mean",
]


def is_counted(group: Group, thought: Thought, reward_index: int, cut: str) -> bool:
    """Whether a thought counts: it is not aborted, not left out as unclosed, and its reward is not NaN."""
    return use_of_thought(group, reward_index, cut).counted


def stored_rewards(group: Group, layout: Layout) -> list[float]:
    """The stored rewards minus penalties; NaN where there is no reward or the thought does not count."""
    out = []
    for k, reward in enumerate(group.rewards or (math.nan,) * len(group.thoughts)):
        use = use_of_thought(group, k, layout.cut, layout.cut_penalty)
        out.append(reward - use.penalty if use.counted else math.nan)
    return out


def count(batch: Batch, cut: str = "mask") -> Totals:
    """This rank's part of the step's denominators: counted thoughts, their tokens, predicted document tokens.

    A document counts as often as it was drawn, as in any loop over a data set. So it does not matter which
    rank drew it.
    """
    lengths = []
    for group in batch.groups:
        for k, thought in enumerate(group.thoughts):
            if use_of_thought(group, k, cut).counted:
                lengths.append(len(thought.token_ids))
    trunk = sum(len(document.token_ids) - 1 for document in batch.documents)
    return Totals(len(lengths), sum(lengths), trunk)


@dataclass(frozen=True, slots=True)
class _Sized:
    """A unit with the number and the largest length of its rows; a tree counts as rows of one token."""

    unit: Unit
    rows: int
    longest: int

    @classmethod
    def of(cls, unit: Unit, layout: Layout) -> _Sized:
        return cls(unit, *_size(unit, layout))

    @property
    def tokens(self) -> int:
        """Tokens with padding."""
        return self.rows * self.longest


def pack(batch: Batch, layout: Layout, totals: Totals) -> Iterator[MicroBatch]:
    """The micro-batches of a batch, each of at most `token_budget` tokens with padding, with whole groups.

    A group that is larger than the budget (with its document) is split into several micro-batches, each with
    as many of its thoughts as fit, at least one; `offsets` has the index of the first. Padded units of
    similar length go together, so that there is little padding. Trees keep the groups of a document together
    as far as the budget allows.
    """
    units: list[_Sized] = []
    too_large: list[Unit] = []
    for groups, document in families(batch):
        single = [_Sized.of(Unit([group], document), layout) for group in groups]
        fitting = [sized for sized in single if sized.tokens <= layout.token_budget]
        too_large += [sized.unit for sized in single if sized.tokens > layout.token_budget]
        if not groups:
            units.append(_Sized.of(Unit([], document), layout))
        elif layout.tree and fitting:
            units += _fill_trees(fitting, document, layout)
        else:
            units += fitting
    units.sort(key=lambda sized: sized.longest)

    trunks = Trunks.of(batch)
    pending: list[Unit] = []
    rows = width = 0
    for sized in units:
        if pending and (rows + sized.rows) * max(width, sized.longest) > layout.token_budget:
            yield lay_out(pending, layout, totals, trunks)
            pending, rows, width = [], 0, 0
        pending.append(sized.unit)
        rows, width = rows + sized.rows, max(width, sized.longest)
    if pending:
        yield lay_out(pending, layout, totals, trunks)
    for (group,), document in too_large:
        for first, part in _split_group(group, document, layout):
            yield lay_out([Unit([part], document)], layout, totals, trunks, first)


def families(batch: Batch) -> list[Unit]:
    """Each document with its groups.

    Groups whose document is not in the batch, and documents without groups, are units of their own.
    """
    documents = {document.id: document for document in batch.documents}
    groups: dict[str, list[Group]] = {document.id: [] for document in batch.documents}
    for group in batch.groups:
        groups.setdefault(group.position.document_id, []).append(group)
    return [Unit(own, documents.get(document_id)) for document_id, own in groups.items()]


def cost(unit: Unit, layout: Layout) -> int:
    """Tokens that a unit puts through the model, with padding; for a tree an upper bound."""
    return _Sized.of(unit, layout).tokens


def joined(group: Group, part: Group) -> Group:
    """A group with the thoughts of the part that follows it."""
    rewards = None if group.rewards is None or part.rewards is None else group.rewards + part.rewards
    return replace(group, thoughts=group.thoughts + part.thoughts, rewards=rewards)


def _split_group(group: Group, document: Document | None, layout: Layout) -> Iterator[tuple[int, Group]]:
    """The parts of a group that fit the budget, each with the index of its first thought."""

    def part(first: int, last: int) -> Group:
        rewards = None if group.rewards is None else group.rewards[first:last]
        return replace(group, thoughts=group.thoughts[first:last], rewards=rewards)

    first = 0
    for last in range(2, len(group.thoughts) + 1):
        if last - first > 1 and cost(Unit([part(first, last)], document), layout) > layout.token_budget:
            yield first, part(first, last - 1)
            first = last - 1
    yield first, part(first, len(group.thoughts))


def _fill_trees(single: Sequence[_Sized], document: Document | None, layout: Layout) -> Iterator[_Sized]:
    """Units of a document with as many groups as fit the budget, from units with one group each."""
    trunk = len(document.token_ids) if document else 0
    groups: list[Group] = []
    size = trunk
    for sized in single:
        branches = sized.rows - trunk
        if groups and size + branches > layout.token_budget:
            yield _Sized(Unit(groups, document), size, 1)
            groups, size = [], trunk
        groups += sized.unit.groups
        size += branches
    yield _Sized(Unit(groups, document), size, 1)


def _size(unit: Unit, layout: Layout) -> tuple[int, int]:
    """The number and the largest length of a unit's rows; a tree counts as rows of one token."""
    groups, document = unit
    trunk = len(document.token_ids) if document else 0
    if layout.tree:
        return trunk + sum(_branch_tokens(group, document, layout) for group in groups), 1
    lengths = [trunk] if document else []
    for group in groups:
        prompt = group.prompt
        around = len(prompt.token_ids) + len(prompt.close_ids) + len(prompt.join_ids)
        around += len(target_of(group, layout))
        lengths += [around + len(thought.token_ids) for thought in group.thoughts]
        lengths.append(around)  # the no-think arm
    return len(lengths), max(lengths)


def _branch_tokens(group: Group, document: Document | None, layout: Layout) -> int:
    """The most tokens that a group adds to its document's tree.

    Tokens that prompts of different groups share beyond the document are counted for each of them.
    """
    prompt, target = group.prompt, target_of(group, layout)
    shared = (
        shared_prefix_length(np.asarray(document.token_ids), np.asarray(prompt.token_ids)) if document else 0
    )
    after = 1 + len(prompt.close_ids) + len(prompt.join_ids) + len(target)
    total = len(prompt.token_ids) - shared + sum(after + len(t.token_ids) for t in group.thoughts)
    context = layout.no_think_ids.get(group.id)
    if target and (context is not None or document is None):
        total += len(group.position.context_ids if context is None else context) + len(target)
    return total
