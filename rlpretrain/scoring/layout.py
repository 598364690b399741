"""Groups and documents as one micro-batch: rows of token ids, and where in them each log-prob is read.

There is a row for each counted thought (prompt, thought, target), one for each document (its next-token loss
and the raw no-think arm), and one for each no-think context that is not the document itself. Padded rows are
padded on the right, so a model's default position ids are right. A tree holds tokens that rows share only
once. Legend: see rlpretrain/types.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from rlpretrain.scoring.trunks import Trunk, Trunks
from rlpretrain.scoring.unclosed import use_of_thought
from rlpretrain.tree import grow
from rlpretrain.types import Arm, Document, MicroBatch, Totals
from rollout.types import Group


class Unit(NamedTuple):
    """Groups that are laid out together, with their document if its loss is taken there."""

    groups: list[Group]
    document: Document | None


@dataclass(slots=True)
class Layout:
    """How thoughts are laid out and weighted; `cut` and `reduction` as in the configuration."""

    token_budget: int
    cut: str = "mask"
    cut_penalty: float = 0.0
    reduction: str = "thought_mean"
    pad_id: int = 0
    tree: bool = False
    target: bool = True
    """False: no target is scored, because the rewards are stored on the groups."""
    whole_arms: bool = False
    """`Arm` holds whole documents, for a baseline that caches their log-probs."""
    no_think_ids: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Group id → context of its no-think arm, where that is not the document."""


def target_of(group: Group, layout: Layout) -> tuple[int, ...]:
    """The target ids that are scored."""
    return group.position.target_ids if layout.target else ()


def token_mean(totals: Totals) -> float:
    """The weight of a token that, divided by the number of thoughts, gives the mean over all tokens."""
    return totals.thoughts / max(totals.thought_tokens, 1)


def lay_out(
    units: Sequence[Unit], layout: Layout, totals: Totals, trunks: Trunks, first_thought: int = 0
) -> MicroBatch:
    """The micro-batch of these units. `first_thought`: the index of the first thought in its whole group."""
    groups = [group for unit in units for group in unit.groups]
    rows: list[tuple[int, ...]] = []
    documents: dict[str, int] = {}  # document id → its row
    trunk: list[Trunk] = []  # has a document that was drawn twice two times, both with the same row
    for _, document in units:
        if document is not None and document.id not in documents:
            documents[document.id] = len(rows)
            trunk += [Trunk(len(rows), document, asked) for asked in trunks.take(document)]
            rows.append(document.token_ids)

    arrays = _Arrays.for_groups(groups, layout)
    for b, group in enumerate(groups):
        _lay_no_think_arm(arrays, rows, b, group, documents, layout)
        for g in range(len(group.thoughts)):
            _lay_thought(arrays, rows, b, g, group, layout, totals)

    if layout.tree:  # the state after a row's last token predicts nothing
        ids, tree, indices = grow([row[:-1] for row in rows])
        input_ids, attention = torch.from_numpy(ids)[None], torch.ones(1, len(ids), dtype=torch.int64)
        position_ids = torch.from_numpy(tree.positions)[None]
    else:
        (input_ids, attention), tree, position_ids = _pad(rows, layout.pad_id), None, None
        indices = [np.arange(len(row)) + r * input_ids.shape[1] for r, row in enumerate(rows)]
    trunk_rows = [indices[t.row][: len(t) - 1] for t in trunk]
    trunk_labels = [token for t in trunk for token in rows[t.row][1:]]
    return MicroBatch(
        input_ids=input_ids,
        attention_mask=attention,
        position_ids=position_ids,
        tree=tree,
        row_tokens=sum(map(len, rows)),
        arm=_arm(rows, arrays.baseline_at, layout),
        groups=groups,
        documents=[t.document for t in trunk],
        offsets=[first_thought] * len(groups),
        thought_rows=_flat_indices(arrays.thought_at, indices),
        thought_labels=torch.from_numpy(arrays.thought_labels),
        thought_mask=torch.from_numpy(arrays.thought_mask),
        token_weights=torch.from_numpy(arrays.token_weights.astype(np.float32)),
        behaviour_logps=torch.from_numpy(arrays.behaviour_logps.astype(np.float32)),
        given=torch.from_numpy(arrays.given),
        counted=torch.from_numpy(arrays.counted),
        penalty=torch.from_numpy(arrays.penalty),
        target_rows=_flat_indices(arrays.target_at, indices),
        target_labels=torch.from_numpy(arrays.target_labels),
        target_mask=torch.from_numpy(arrays.target_mask),
        baseline_rows=_flat_indices(arrays.baseline_at, indices),
        trunk_rows=torch.from_numpy(np.concatenate([*trunk_rows, np.zeros(0, np.int64)])),
        trunk_labels=torch.tensor(trunk_labels, dtype=torch.int64),
        asked=[t.asked for t in trunk],
    )


def idle(pad_id: int) -> MicroBatch:
    """A micro-batch in which nothing counts.

    A rank runs it while other ranks still have work, so that collective operations match.
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
        given=bt.bool(),
        counted=bt.bool(),
        penalty=bt.float(),
        target_rows=bgt,
        target_labels=bt,
        target_mask=bt.bool(),
        baseline_rows=bt,
        trunk_rows=none,
        trunk_labels=none,
    )


@dataclass(frozen=True, slots=True)
class _Arrays:
    """The fields of `MicroBatch` about groups, while they are filled.

    `..._at` hold pairs (row, column); -1: in no row.
    """

    thought_at: np.ndarray  # [B, G, L, 2]
    thought_labels: np.ndarray  # [B, G, L]
    thought_mask: np.ndarray  # [B, G, L]
    token_weights: np.ndarray  # [B, G, L]
    behaviour_logps: np.ndarray  # [B, G, L]
    given: np.ndarray  # [B, G]
    counted: np.ndarray  # [B, G]
    penalty: np.ndarray  # [B, G]
    target_at: np.ndarray  # [B, G, T, 2]
    target_labels: np.ndarray  # [B, T]
    target_mask: np.ndarray  # [B, T]
    baseline_at: np.ndarray  # [B, T, 2]

    @classmethod
    def for_groups(cls, groups: Sequence[Group], layout: Layout) -> _Arrays:
        """Empty arrays of the right shapes."""
        b, g = len(groups), max((len(group.thoughts) for group in groups), default=0)
        tokens = max((len(t.token_ids) for group in groups for t in group.thoughts), default=0)
        targets = max((len(target_of(group, layout)) for group in groups), default=0)
        return cls(
            thought_at=np.zeros((b, g, tokens, 2), np.int64),
            thought_labels=np.zeros((b, g, tokens), np.int64),
            thought_mask=np.zeros((b, g, tokens), bool),
            token_weights=np.zeros((b, g, tokens)),
            behaviour_logps=np.zeros((b, g, tokens)),
            given=np.zeros((b, g), bool),
            counted=np.zeros((b, g), bool),
            penalty=np.zeros((b, g), np.float32),
            target_at=np.zeros((b, g, targets, 2), np.int64),
            target_labels=np.zeros((b, targets), np.int64),
            target_mask=np.zeros((b, targets), bool),
            baseline_at=np.full((b, targets, 2), -1),
        )


def _lay_no_think_arm(
    arrays: _Arrays,
    rows: list[tuple[int, ...]],
    b: int,
    group: Group,
    documents: dict[str, int],
    layout: Layout,
) -> None:
    """Lay the target of group `b` without a thought: in its document's row, or in a row of its own."""
    target = target_of(group, layout)
    size = len(target)
    if not size:
        return
    arrays.target_labels[b, :size] = target
    arrays.target_mask[b, :size] = True
    context = layout.no_think_ids.get(group.id)
    document_row = documents.get(group.position.document_id)
    if context is None and document_row is not None:
        start = group.position.index
        if rows[document_row][start : start + size] != tuple(target):
            raise ValueError(
                f"group {group.id}: target differs from the document at token {start} (document "
                f"{group.position.document_id!r})"
            )
        row = document_row
    else:
        context = group.position.context_ids if context is None else context
        start, row = len(context), len(rows)
        rows.append((*context, *target))
    arrays.baseline_at[b, :size, 0] = row
    arrays.baseline_at[b, :size, 1] = np.arange(start - 1, start - 1 + size)


def _lay_thought(
    arrays: _Arrays, rows: list[tuple[int, ...]], b: int, g: int, group: Group, layout: Layout, totals: Totals
) -> None:
    """Lay the row of thought `g` of group `b`, if the thought is used."""
    use = use_of_thought(group, g, layout.cut, layout.cut_penalty)
    if not use.counted:
        return
    thought, prompt, target = group.thoughts[g], group.prompt, target_of(group, layout)
    length, size, row = len(thought.token_ids), len(target), len(rows)
    head = (*prompt.token_ids, *thought.token_ids, *use.close_ids, *prompt.join_ids)
    rows.append((*head, *target))
    arrays.given[b, g], arrays.counted[b, g] = thought.given, True
    arrays.penalty[b, g] = use.penalty
    start = len(prompt.token_ids)
    arrays.thought_at[b, g, :length, 0] = row
    arrays.thought_at[b, g, :length, 1] = np.arange(start - 1, start - 1 + length)
    arrays.thought_labels[b, g, :length] = thought.token_ids
    arrays.thought_mask[b, g, :length] = True
    arrays.token_weights[b, g, :length] = _token_weight(length, layout, totals)
    arrays.behaviour_logps[b, g, :length] = thought.behaviour_logps
    start = len(head)
    arrays.target_at[b, g, :size, 0] = row
    arrays.target_at[b, g, :size, 1] = np.arange(start - 1, start - 1 + size)


def _token_weight(length: int, layout: Layout, totals: Totals) -> float:
    """The weight of each token of a thought; the loss then divides by the number of thoughts."""
    if layout.reduction == "sum":
        return 1.0
    return token_mean(totals) if layout.reduction == "token_mean" else 1 / max(length, 1)


def _flat_indices(at: np.ndarray, indices: Sequence[np.ndarray]) -> torch.Tensor:
    """Pairs (row, column) as indices into the flattened states; -1 stays -1.

    `indices` has, for each row, the index of each of its tokens.
    """
    begins = np.cumsum([0, *map(len, indices)])
    inside = at[..., 0] >= 0
    flat = np.where(inside, begins[at[..., 0]] + at[..., 1], 0)
    return torch.from_numpy(np.where(inside, np.concatenate(indices)[flat], -1))


def _pad(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of ids, padded on the right, and the attention mask."""
    width = max(map(len, rows), default=0)
    ids, mask = np.full((len(rows), width), pad_id, np.int64), np.zeros((len(rows), width), np.int64)
    for r, row in enumerate(rows):
        ids[r, : len(row)], mask[r, : len(row)] = row, 1
    return torch.from_numpy(ids), torch.from_numpy(mask)


def _arm(rows: Sequence[Sequence[int]], at: np.ndarray, layout: Layout) -> Arm:
    """The rows of the no-think arm, each up to the last state that is read, or whole (`whole_arms`)."""
    row_of, column_of = at[..., 0], at[..., 1]
    inside = row_of >= 0
    used, inverse = np.unique(row_of[inside], return_inverse=True)
    arm_rows = []
    for row in used:
        end = None if layout.whole_arms else int(column_of[row_of == row].max()) + 1
        arm_rows.append(rows[row][:end])
    ids, mask = _pad(arm_rows, layout.pad_id)
    flat = np.full(at.shape[:-1], -1)
    flat[inside] = inverse * ids.shape[1] + column_of[inside]
    return Arm(ids, mask, torch.from_numpy(flat))
