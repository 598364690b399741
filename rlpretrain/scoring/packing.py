"""Groups and documents → micro-batches. A group straddles two of them only if it fits into none; a draw
counts once.

A row per thought (prompt + thought + target), a row per document (its next-token loss and the no-think arm).
The padded layout pads them on the right, so default position ids are right for any architecture; the tree
layout holds what rows share once. Legend: see rlpretrain/types.py.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from rlpretrain.ranks import Ranks
from rlpretrain.scoring.trunks import Trunk, Trunks
from rlpretrain.tree import common, grow
from rlpretrain.types import Arm, Batch, Document, MicroBatch, Totals
from rollout.types import FinishReason, Group, Thought

Unit = tuple[list[Group], Document | None]
"""Groups that are laid together, with their document where its loss is taken."""


@dataclass(slots=True)
class Layout:
    """How thoughts are laid out and weighed; `cut` and `reduction` as in the configuration.

    Without `target` nothing is scored after a thought: rewards that need no log-probs of targets are on the
    groups.
    """

    token_budget: int
    cut: str = "mask"
    cut_penalty: float = 0.0
    reduction: str = "thought_mean"
    pad_id: int = 0
    tree: bool = False
    target: bool = True
    whole_arms: bool = False  # Arm holds whole rows: what a baseline needs that remembers documents
    no_think_ids: dict[str, tuple[int, ...]] = field(
        default_factory=dict
    )  # group id → context of the no-think arm


def is_counted(group: Group, thought: Thought, reward_index: int, cut: str) -> bool:
    """Whether a thought takes part in the step: not aborted, not cut off under `mask`, its stored reward
    not NaN.
    """
    if thought.finish_reason is FinishReason.ABORT:
        return False
    if thought.finish_reason is not FinishReason.CLOSE and cut == "mask":
        return False
    return group.rewards is None or group.rewards[reward_index] == group.rewards[reward_index]


def stored_rewards(group: Group, layout: Layout) -> list[float]:
    """The rewards on a group less what the cut-off policy takes; NaN where there is none and where a
    thought does not count.
    """
    rewards = group.rewards or (math.nan,) * len(group.thoughts)
    taken = layout.cut_penalty * (layout.cut == "penalise")
    return [
        reward - taken * (thought.finish_reason is not FinishReason.CLOSE)
        if is_counted(group, thought, k, layout.cut)
        else math.nan
        for k, (thought, reward) in enumerate(zip(group.thoughts, rewards, strict=True))
    ]


def count(batch: Batch, cut: str = "mask") -> Totals:
    """This rank's part of the step's denominators: counted thoughts, their tokens, and predicted document
    tokens.

    A document counts as often as it was drawn, as in any loop over a data set; so it does not matter which
    rank drew it.
    """
    lengths = [
        len(t.token_ids) for g in batch.groups for i, t in enumerate(g.thoughts) if is_counted(g, t, i, cut)
    ]
    return Totals(len(lengths), sum(lengths), sum(len(d.token_ids) - 1 for d in batch.documents))


def token_mean(totals: Totals) -> float:
    """The weight of a token that, divided by the number of thoughts, gives the mean over all tokens."""
    return totals.thoughts / max(totals.thought_tokens, 1)


def pack(batch: Batch, layout: Layout, totals: Totals) -> Iterator[MicroBatch]:
    """Lay a batch out in micro-batches of at most `token_budget` tokens, padding included, each with whole
    groups.

    A group that is larger than the budget (with its document) is laid in several, as many of its thoughts at
    a time as fit, at least one; `offsets` says which. Padded, units of similar length go together, so that
    little is padding; in a tree the groups of a document stay with it as far as the budget allows.
    """
    units: list[tuple[Unit, int, int]] = []  # with its rows and the longest of them
    large: list[tuple[Group, Document | None]] = []
    for groups, document in families(batch):
        alone = [(([g], document), *_size(([g], document), layout)) for g in groups]
        fit = [one for one in alone if one[1] * one[2] <= layout.token_budget]
        large += [
            (unit[0][0], document) for unit, rows, longest in alone if rows * longest > layout.token_budget
        ]
        if not groups:
            units.append((([], document), *_size(([], document), layout)))
        elif layout.tree and fit:
            units += _split(fit, document, layout)
        else:
            units += fit
    units.sort(key=lambda unit: unit[2])

    pending: list[Unit] = []
    rows = width = 0
    trunks = Trunks.of(batch)
    for unit, more, longest in units:
        if pending and (rows + more) * max(width, longest) > layout.token_budget:
            yield _lay(pending, layout, totals, trunks)
            pending, rows, width = [], 0, 0
        pending.append(unit)
        rows, width = rows + more, max(width, longest)
    if pending:
        yield _lay(pending, layout, totals, trunks)
    for group, document in large:
        for first, part in _parts(group, document, layout):
            yield _lay([([part], document)], layout, totals, trunks, first)


def families(batch: Batch) -> list[Unit]:
    """Each document with its groups; groups without a document of theirs, and documents without groups, by
    themselves.
    """
    trunk = {d.id: d for d in batch.documents}
    by_document: dict[str, list[Group]] = {d.id: [] for d in batch.documents}
    for group in batch.groups:
        by_document.setdefault(group.position.document_id, []).append(group)
    return [(groups, trunk.get(document_id)) for document_id, groups in by_document.items()]


def cost(unit: Unit, layout: Layout) -> int:
    """Tokens that a unit puts through the model, padding included; of a tree at most."""
    rows, longest = _size(unit, layout)
    return rows * longest


def balanced(batch: Batch, layout: Layout, ranks: Ranks) -> Batch:
    """The batch with documents, and their groups, handed from ranks that have more to do to those that have
    less.

    All ranks call it. Nothing moves while the largest share is within 5% of the mean. The loss does not see
    who has what: its denominators are those of all ranks.
    """
    if ranks.size == 1:
        return batch
    units = families(batch)
    moves = handed_over(ranks.gather([cost(unit, layout) for unit in units]))
    given = {i: to for (rank, i), to in moves.items() if rank == ranks.rank}
    drawn = Counter(d.id for d in batch.documents)
    again = [
        [([], d)] * (drawn[d.id] - 1) if d is not None else [] for _, d in units
    ]  # what was drawn twice is in it twice
    if moves:
        sent = ranks.gather([(to, unit) for i, to in given.items() for unit in [units[i], *again[i]]])
        units, again = ([x for i, x in enumerate(those) if i not in given] for those in (units, again))
        units += [unit for part in sent for to, unit in part if to == ranks.rank]
    units += [unit for those in again for unit in those]
    return replace(
        batch,
        groups=[g for groups, _ in units for g in groups],
        documents=[d for _, d in units if d is not None],
    )


def handed_over(costs: Sequence[Sequence[int]]) -> dict[tuple[int, int], int]:
    """(rank, unit) → the rank that takes it over, given the units' costs on each rank; few of them move."""
    here = {(rank, i): rank for rank, own in enumerate(costs) for i in range(len(own))}
    loads = [sum(own) for own in costs]
    while max(loads) > 1.05 * sum(loads) / len(loads):
        most, least = loads.index(max(loads)), loads.index(min(loads))
        gap = loads[most] - loads[least]
        fit = [u for u, rank in here.items() if rank == most and 0 < costs[u[0]][u[1]] < gap]
        if not fit:
            break
        unit = min(fit, key=lambda u: abs(2 * costs[u[0]][u[1]] - gap))
        here[unit] = least
        loads[most] -= costs[unit[0]][unit[1]]
        loads[least] += costs[unit[0]][unit[1]]
    return {unit: rank for unit, rank in here.items() if rank != unit[0]}


def _parts(group: Group, document: Document | None, layout: Layout) -> Iterator[tuple[int, Group]]:
    """A group in pieces that fit, each with the place of its first thought."""

    def piece(first: int, last: int) -> Group:
        kept = None if group.rewards is None else group.rewards[first:last]
        return replace(group, thoughts=group.thoughts[first:last], rewards=kept)

    first = 0
    for last in range(2, len(group.thoughts) + 1):
        if last - first > 1 and cost(([piece(first, last)], document), layout) > layout.token_budget:
            yield first, piece(first, last - 1)
            first = last - 1
    yield first, piece(first, len(group.thoughts))


def joined(group: Group, part: Group) -> Group:
    """A group with the thoughts of the part that follows it."""
    rewards = None if group.rewards is None or part.rewards is None else group.rewards + part.rewards
    return replace(group, thoughts=group.thoughts + part.thoughts, rewards=rewards)


def _split(
    alone: Sequence[tuple[Unit, int, int]], document: Document | None, layout: Layout
) -> Iterator[tuple[Unit, int, int]]:
    """A document with as many of its groups at a time as the budget takes; `alone` has each with the
    document, and its tokens.
    """
    trunk = len(document.token_ids) if document else 0
    part: list[Group] = []
    size = trunk
    for (groups, _), tokens, _ in alone:
        if part and size + tokens - trunk > layout.token_budget:
            yield (part, document), size, 1
            part, size = [], trunk
        part += groups
        size += tokens - trunk
    yield (part, document), size, 1


def _branches(group: Group, document: Document | None, layout: Layout) -> int:
    """Tokens that a group adds to its document's trunk, at most: heads that prompts share among each other
    count for each.
    """
    prompt, target = group.prompt, _target(group, layout)
    shared = common(np.asarray(document.token_ids), np.asarray(prompt.token_ids)) if document else 0
    after = 1 + len(prompt.close_ids) + len(prompt.join_ids) + len(target)
    total = len(prompt.token_ids) - shared + sum(after + len(t.token_ids) for t in group.thoughts)
    arm = layout.no_think_ids.get(group.id)
    if target and (arm is not None or document is None):
        total += len(group.position.context_ids if arm is None else arm) + len(target)
    return total


def _size(unit: Unit, layout: Layout) -> tuple[int, int]:
    """Rows, and the longest of them; a tree's tokens are rows of one."""
    groups, document = unit
    if layout.tree:
        return sum(_branches(g, document, layout) for g in groups) + (
            len(document.token_ids) if document else 0
        ), 1
    lengths = [len(document.token_ids)] if document else []
    for g in groups:
        around = (
            len(g.prompt.token_ids)
            + len(g.prompt.close_ids)
            + len(g.prompt.join_ids)
            + len(_target(g, layout))
        )
        lengths += [around + len(t.token_ids) for t in g.thoughts]
        lengths.append(around)
    return len(lengths), max(lengths)


def _target(group: Group, layout: Layout) -> tuple[int, ...]:
    return group.position.target_ids if layout.target else ()


def _lay(units: Sequence[Unit], layout: Layout, totals: Totals, trunks: Trunks, first: int = 0) -> MicroBatch:
    groups = [g for gs, _ in units for g in gs]
    rows: list[tuple[int, ...]] = []
    trunk_at: dict[str, int] = {}
    trunk: list[Trunk] = []  # a document that was drawn twice stands here twice: one row, read twice
    for _, document in units:
        if document is not None and document.id not in trunk_at:
            trunk_at[document.id] = len(rows)
            trunk += [Trunk(len(rows), document, asked) for asked in trunks.take(document)]
            rows.append(document.token_ids)

    shape_b, shape_g = len(groups), max((len(g.thoughts) for g in groups), default=0)
    shape_l = max((len(t.token_ids) for g in groups for t in g.thoughts), default=0)
    shape_t = max((len(_target(g, layout)) for g in groups), default=0)
    thought_at = np.full((shape_b, shape_g, shape_l, 2), 0)
    thought_labels, behaviour = (
        np.zeros((shape_b, shape_g, shape_l), np.int64),
        np.zeros((shape_b, shape_g, shape_l)),
    )
    thought_mask, weights = np.zeros((shape_b, shape_g, shape_l), bool), np.zeros((shape_b, shape_g, shape_l))
    counted, penalty = np.zeros((shape_b, shape_g), bool), np.zeros((shape_b, shape_g), np.float32)
    target_at, target_labels = (
        np.full((shape_b, shape_g, shape_t, 2), 0),
        np.zeros((shape_b, shape_t), np.int64),
    )
    target_mask, baseline_at = np.zeros((shape_b, shape_t), bool), np.full((shape_b, shape_t, 2), -1)

    for b, group in enumerate(groups):
        target, prompt = _target(group, layout), group.prompt
        size = len(target)
        target_labels[b, :size], target_mask[b, :size] = target, True
        ids = layout.no_think_ids.get(group.id)
        home = trunk_at.get(group.position.document_id)
        if not size:
            pass
        elif ids is None and home is not None:  # raw no-think arm: the document's own row
            at = group.position.index
            if rows[home][at : at + size] != tuple(target):
                raise ValueError(
                    f"group {group.id}: document {group.position.document_id!r} goes on otherwise at token "
                    f"{at}"
                )
            baseline_at[b, :size] = [(home, at + k - 1) for k in range(size)]
        else:
            ids = group.position.context_ids if ids is None else ids
            baseline_at[b, :size] = [(len(rows), len(ids) + k - 1) for k in range(size)]
            rows.append((*ids, *target))
        for g, thought in enumerate(group.thoughts):
            if not is_counted(group, thought, g, layout.cut):
                continue
            length, start = len(thought.token_ids), len(prompt.token_ids)
            close = () if thought.finish_reason is FinishReason.CLOSE else prompt.close_ids
            row = (*prompt.token_ids, *thought.token_ids, *close, *prompt.join_ids)
            counted[b, g] = True
            penalty[b, g] = layout.cut_penalty * (layout.cut == "penalise" and bool(close))
            thought_at[b, g, :length] = [(len(rows), start + k - 1) for k in range(length)] or thought_at[
                b, g, :0
            ]
            thought_labels[b, g, :length], thought_mask[b, g, :length] = thought.token_ids, True
            weights[b, g, :length] = _token_weight(length, layout, totals)
            behaviour[b, g, :length] = thought.behaviour_logps
            target_at[b, g, :size] = [(len(rows), len(row) + k - 1) for k in range(size)] or target_at[
                b, g, :0
            ]
            rows.append((*row, *target))

    if layout.tree:  # the state after a row's last token predicts nothing
        ids, tree, where = grow([row[:-1] for row in rows])
        input_ids, attention = torch.from_numpy(ids)[None], torch.ones(1, len(ids), dtype=torch.int64)
        places = torch.from_numpy(tree.positions)[None]
    else:
        (input_ids, attention), tree, places = _pad(rows, layout.pad_id), None, None
        where = [np.arange(len(row)) + r * input_ids.shape[1] for r, row in enumerate(rows)]
    return MicroBatch(
        input_ids=input_ids,
        attention_mask=attention,
        position_ids=places,
        tree=tree,
        row_tokens=sum(map(len, rows)),
        arm=_arm(rows, baseline_at, layout),
        groups=groups,
        documents=[t.document for t in trunk],
        offsets=[first] * len(groups),
        thought_rows=_flat(thought_at, where),
        thought_labels=torch.from_numpy(thought_labels),
        thought_mask=torch.from_numpy(thought_mask),
        token_weights=torch.from_numpy(weights.astype(np.float32)),
        behaviour_logps=torch.from_numpy(behaviour.astype(np.float32)),
        counted=torch.from_numpy(counted),
        penalty=torch.from_numpy(penalty),
        target_rows=_flat(target_at, where),
        target_labels=torch.from_numpy(target_labels),
        target_mask=torch.from_numpy(target_mask),
        baseline_rows=_flat(baseline_at, where),
        trunk_rows=torch.from_numpy(
            np.concatenate([*(where[t.row][: len(t) - 1] for t in trunk), np.zeros(0, np.int64)])
        ),
        trunk_labels=torch.tensor([x for t in trunk for x in rows[t.row][1:]], dtype=torch.int64),
        asked=[t.asked for t in trunk],
    )


def _token_weight(length: int, layout: Layout, totals: Totals) -> float:
    """The weight of each token of a thought; the loss then divides by the number of thoughts."""
    if layout.reduction == "sum":
        return 1.0
    return token_mean(totals) if layout.reduction == "token_mean" else 1 / max(length, 1)


def _flat(at: np.ndarray, where: Sequence[np.ndarray]) -> torch.Tensor:
    """(row, column) pairs → indices into the flattened states; (-1, -1) stays -1. `where` has those of
    each row's tokens.
    """
    begins = np.cumsum([0, *map(len, where)])
    inside = at[..., 0] >= 0
    return torch.from_numpy(
        np.where(inside, np.concatenate(where)[np.where(inside, begins[at[..., 0]] + at[..., 1], 0)], -1)
    )


def _pad(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of ids, padded on the right, and a mask of what is none."""
    width = max(map(len, rows), default=0)
    ids, mask = np.full((len(rows), width), pad_id, np.int64), np.zeros((len(rows), width), np.int64)
    for r, row in enumerate(rows):
        ids[r, : len(row)], mask[r, : len(row)] = row, 1
    return torch.from_numpy(ids), torch.from_numpy(mask)


def _arm(rows: Sequence[Sequence[int]], at: np.ndarray, layout: Layout) -> Arm:
    """The rows of the no-think arm, up to what is asked of them unless they are wanted whole."""
    used, inverse = np.unique(at[..., 0][at[..., 0] >= 0], return_inverse=True)
    ends = [None if layout.whole_arms else int(at[..., 1][at[..., 0] == r].max()) + 1 for r in used]
    ids, mask = _pad([rows[r][:end] for r, end in zip(used, ends, strict=True)], layout.pad_id)
    flat = np.full(at.shape[:-1], -1)
    flat[at[..., 0] >= 0] = inverse * ids.shape[1] + at[..., 1][at[..., 0] >= 0]
    return Arm(ids, mask, torch.from_numpy(flat))


def idle(pad_id: int) -> MicroBatch:
    """A micro-batch in which nothing counts: what a rank runs while others still have work, so that
    collectives match.
    """
    none = torch.zeros(0, dtype=torch.int64)
    ids = torch.full((1, 2), pad_id, dtype=torch.int64)
    bgl, bgt, bt = none.reshape(0, 0, 0), none.reshape(0, 0, 0), none.reshape(0, 0)
    return MicroBatch(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        position_ids=None,
        tree=None,
        row_tokens=2,
        groups=(),
        documents=(),
        offsets=(),
        arm=Arm(ids[:0], ids[:0], bt),
        thought_rows=bgl,
        thought_labels=bgl,
        thought_mask=bgl.bool(),
        token_weights=bgl.float(),
        behaviour_logps=bgl.float(),
        counted=bt.bool(),
        penalty=bt.float(),
        target_rows=bgt,
        target_labels=bt,
        target_mask=bt.bool(),
        baseline_rows=bt,
        trunk_rows=none,
        trunk_labels=none,
    )
