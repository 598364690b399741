"""Groups and documents → micro-batches. A group never straddles two of them, a document's trunk loss counts once.

The padded layout: one row per thought (prompt + thought + target), one row per document (its next-token loss and the
no-think arm). Rows are padded on the right, so default position ids are right for any architecture.
Legend: see rlpretrain/types.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from rlpretrain.types import Batch, Document, MicroBatch, Totals
from rollout.types import FinishReason, Group, Thought


@dataclass(slots=True)
class Layout:
    """How thoughts are laid out and weighed; `cut` and `reduction` as in the configuration."""

    token_budget: int
    cut: str = "mask"
    cut_penalty: float = 0.0
    reduction: str = "thought_mean"
    pad_id: int = 0
    no_think_ids: dict[str, tuple[int, ...]] = field(default_factory=dict)  # group id → context of the no-think arm


def is_counted(group: Group, thought: Thought, reward_index: int, cut: str) -> bool:
    """Whether a thought takes part in the step: not aborted, not cut off under `mask`, its stored reward not NaN."""
    if thought.finish_reason is FinishReason.ABORT or not group.position.target_ids:
        return False
    if thought.finish_reason is not FinishReason.CLOSE and cut == "mask":
        return False
    return group.rewards is None or group.rewards[reward_index] == group.rewards[reward_index]


def count(batch: Batch, cut: str = "mask") -> Totals:
    """This rank's part of the step's denominators: counted thoughts, their tokens, and predicted document tokens."""
    lengths = [len(t.token_ids) for g in batch.groups for i, t in enumerate(g.thoughts) if is_counted(g, t, i, cut)]
    return Totals(len(lengths), sum(lengths), sum(len(d.token_ids) - 1 for d in {d.id: d for d in batch.documents}.values()))


def pack(batch: Batch, layout: Layout, totals: Totals) -> Iterator[MicroBatch]:
    """Lay a batch out in micro-batches of at most `token_budget` padded tokens, each with whole groups.

    A single group (with its document) larger than the budget gets a micro-batch of its own. Units of similar length go
    together, so that little is padding.
    """
    trunk = {d.id: d for d in batch.documents}
    units: list[tuple[list[Group], Document | None]] = []
    by_document: dict[str, list[Group]] = {d.id: [] for d in batch.documents}
    for group in batch.groups:
        by_document.setdefault(group.position.document_id, []).append(group)
    for document_id, groups in by_document.items():
        if not groups:
            units.append(([], trunk[document_id]))
        for group in groups:
            units.append(([group], trunk.get(document_id)))
    units.sort(key=lambda u: _size(u)[1])

    pending: list[tuple[list[Group], Document | None]] = []
    rows = width = 0
    told: set[str] = set()
    for unit in units:
        more, longest = _size(unit)
        if pending and (rows + more) * max(width, longest) > layout.token_budget:
            yield _lay(pending, layout, totals, told)
            pending, rows, width = [], 0, 0
        pending.append(unit)
        rows, width = rows + more, max(width, longest)
    if pending:
        yield _lay(pending, layout, totals, told)


def _size(unit: tuple[list[Group], Document | None]) -> tuple[int, int]:
    """Rows, and the longest of them."""
    groups, document = unit
    lengths = [len(document.token_ids)] if document else []
    for g in groups:
        around = len(g.prompt.token_ids) + len(g.prompt.close_ids) + len(g.prompt.join_ids) + len(g.position.target_ids)
        lengths += [around + len(t.token_ids) for t in g.thoughts]
        lengths.append(around)
    return len(lengths), max(lengths)


def _lay(units: Sequence[tuple[list[Group], Document | None]], layout: Layout, totals: Totals, told: set[str]) -> MicroBatch:
    groups = [g for gs, _ in units for g in gs]
    rows: list[tuple[int, ...]] = []
    trunk_at: dict[str, int] = {}
    trunk: list[tuple[int, int]] = []  # (row, document length) of the documents whose loss is counted here
    for _, document in units:
        if document is not None and document.id not in trunk_at:
            trunk_at[document.id] = len(rows)
            if document.id not in told:
                told.add(document.id)
                trunk.append((len(rows), len(document.token_ids)))
            rows.append(document.token_ids)

    shape_b, shape_g = len(groups), max((len(g.thoughts) for g in groups), default=0)
    shape_l = max((len(t.token_ids) for g in groups for t in g.thoughts), default=0)
    shape_t = max((len(g.position.target_ids) for g in groups), default=0)
    thought_at = np.full((shape_b, shape_g, shape_l, 2), 0)
    thought_labels, behaviour = np.zeros((shape_b, shape_g, shape_l), np.int64), np.zeros((shape_b, shape_g, shape_l))
    thought_mask, weights = np.zeros((shape_b, shape_g, shape_l), bool), np.zeros((shape_b, shape_g, shape_l))
    counted, penalty = np.zeros((shape_b, shape_g), bool), np.zeros((shape_b, shape_g), np.float32)
    target_at, target_labels = np.full((shape_b, shape_g, shape_t, 2), 0), np.zeros((shape_b, shape_t), np.int64)
    target_mask, baseline_at = np.zeros((shape_b, shape_t), bool), np.full((shape_b, shape_t, 2), -1)
    each = totals.thoughts / max(totals.thought_tokens, 1)

    for b, group in enumerate(groups):
        target, prompt = group.position.target_ids, group.prompt
        size = len(target)
        target_labels[b, :size], target_mask[b, :size] = target, True
        ids = layout.no_think_ids.get(group.id)
        home = trunk_at.get(group.position.document_id)
        if ids is None and home is not None:  # raw no-think arm: the document's own row
            baseline_at[b, :size] = [(home, group.position.index + k - 1) for k in range(size)]
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
            thought_at[b, g, :length] = [(len(rows), start + k - 1) for k in range(length)] or thought_at[b, g, :0]
            thought_labels[b, g, :length], thought_mask[b, g, :length] = thought.token_ids, True
            weights[b, g, :length] = each if layout.reduction == "token_mean" else 1 / max(length, 1)
            behaviour[b, g, :length] = thought.behaviour_logps
            target_at[b, g, :size] = [(len(rows), len(row) + k - 1) for k in range(size)]
            rows.append((*row, *target))

    width = max(len(r) for r in rows)
    input_ids, attention = np.full((len(rows), width), layout.pad_id), np.zeros((len(rows), width), np.int64)
    for r, ids in enumerate(rows):
        input_ids[r, : len(ids)], attention[r, : len(ids)] = ids, 1
    return MicroBatch(
        input_ids=torch.from_numpy(input_ids.astype(np.int64)), attention_mask=torch.from_numpy(attention),
        position_ids=None, tree=None, groups=groups, documents=[d for _, d in units if d is not None],
        thought_rows=_flat(thought_at, width), thought_labels=torch.from_numpy(thought_labels),
        thought_mask=torch.from_numpy(thought_mask), token_weights=torch.from_numpy(weights.astype(np.float32)),
        behaviour_logps=torch.from_numpy(behaviour.astype(np.float32)), counted=torch.from_numpy(counted),
        penalty=torch.from_numpy(penalty),
        target_rows=_flat(target_at, width), target_labels=torch.from_numpy(target_labels),
        target_mask=torch.from_numpy(target_mask), baseline_rows=_flat(baseline_at, width),
        trunk_rows=torch.tensor([r * width + k for r, n in trunk for k in range(n - 1)], dtype=torch.int64),
        trunk_labels=torch.tensor([x for r, _ in trunk for x in rows[r][1:]], dtype=torch.int64),
    )  # fmt: skip


def _flat(at: np.ndarray, width: int) -> torch.Tensor:
    """(row, column) pairs → indices into the flattened states; (-1, -1) stays -1."""
    return torch.from_numpy(np.where(at[..., 0] < 0, -1, at[..., 0] * width + at[..., 1]).astype(np.int64))


def idle(pad_id: int) -> MicroBatch:
    """A micro-batch in which nothing counts: what a rank runs while others still have work, so that collectives match."""
    none = torch.zeros(0, dtype=torch.int64)
    ids = torch.full((1, 2), pad_id, dtype=torch.int64)
    bgl, bgt, bt = none.reshape(0, 0, 0), none.reshape(0, 0, 0), none.reshape(0, 0)
    return MicroBatch(
        input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=None, tree=None, groups=(), documents=(),
        thought_rows=bgl, thought_labels=bgl, thought_mask=bgl.bool(), token_weights=bgl.float(),
        behaviour_logps=bgl.float(), counted=bt.bool(), penalty=bt.float(), target_rows=bgt, target_labels=bt,
        target_mask=bt.bool(), baseline_rows=bt, trunk_rows=none, trunk_labels=none,
    )  # fmt: skip
