"""What flows inside the trainer. Ids until a MicroBatch, tensors from there on.

Legend: B positions (one a group), G thoughts, L thought tokens, T target tokens, M trunk tokens, R rows and S
columns of the input (a tree is one row). "Row indices" point into the flattened [R*S] hidden states: the
state that *predicts* the token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlpretrain.tree import Tree
from rollout.types import Document, Group


@dataclass(frozen=True, slots=True)
class Batch:
    """What one step trains on: groups, and the documents whose next-token loss it takes, each as often as it
    was drawn.

    `progress` is how far the run is with this batch, 0 to 1. Raises ValueError for two documents of one id
    that differ, or two groups with one id: by it groups are joined to their document, and parts of a group to
    each other.
    """

    groups: Sequence[Group]
    documents: Sequence[Document]
    progress: float = 0.0

    def __post_init__(self) -> None:
        known: dict[str, Document] = {}
        for document in self.documents:
            if known.setdefault(document.id, document).token_ids != document.token_ids:
                raise ValueError(
                    f"two documents of a batch have the id {document.id!r}, and other tokens: ids must be "
                    "unique"
                )
        ids = [group.id for group in self.groups]
        if len(set(ids)) < len(ids):
            twice = next(id_ for id_ in ids if ids.count(id_) > 1)
            raise ValueError(f"two groups of a batch have the id {twice!r}: ids must be unique")


@dataclass(frozen=True, slots=True)
class Totals:
    """Denominators of a step, counted over all its micro-batches and all ranks before the first forward."""

    thoughts: float
    thought_tokens: float
    trunk: float


@dataclass(frozen=True, slots=True)
class Window:
    """The most tokens that a document of some length makes; see `Objective.window`."""

    prompt: int
    """Of a prompt, open tag included."""
    sampled: int
    """Of a prompt with its thought and what is said after it: what an engine must take."""
    row: int
    """Of a whole row, with an injected close tag and the target: what the model must take."""


@dataclass(frozen=True, slots=True)
class Arm:
    """The no-think arm alone, padded: what a model needs that scores nothing else (frozen and EMA
    baselines).
    """

    input_ids: Tensor  # [A, W] int64
    attention_mask: Tensor  # [A, W] int64
    rows: Tensor  # [B, T] int64 into the flattened states; -1 beyond a target


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Groups and their documents, laid out for one forward.

    `tree` is None for the padded layout. A thought that is not `counted` (cut off under `cut: mask`, aborted)
    is nowhere in the input and nowhere in the loss. `token_weights` carries the reduction within and over
    thoughts.
    """

    input_ids: Tensor  # [R, S] int64
    attention_mask: Tensor  # [R, S] int64, 1 counts
    position_ids: Tensor | None  # [R, S], or None where the model's own 0..S-1 is right
    tree: Tree | None
    arm: Arm
    # tokens of all thoughts with their contexts, targets and documents, as if nothing were shared or padded
    row_tokens: int
    groups: Sequence[Group]
    documents: Sequence[
        Document
    ]  # whose next-token loss is taken here, in the order of `trunk_rows`, as often as drawn
    offsets: Sequence[
        int
    ]  # [B] the first thought's place in its whole group; above 0 only in parts of one that fits nowhere
    thought_rows: Tensor  # [B, G, L] int64
    thought_labels: Tensor  # [B, G, L] int64
    thought_mask: Tensor  # [B, G, L] bool, true for sampled tokens of counted thoughts
    token_weights: Tensor  # [B, G, L] float32
    behaviour_logps: Tensor  # [B, G, L] float32
    counted: Tensor  # [B, G] bool
    penalty: Tensor  # [B, G] float32, nats taken from the reward of an unclosed thought under `cut: penalise`
    target_rows: Tensor  # [B, G, T] int64
    target_labels: Tensor  # [B, T] int64
    target_mask: Tensor  # [B, T] bool
    baseline_rows: Tensor  # [B, T] int64, the no-think arm; -1 where the layout has none
    trunk_rows: Tensor  # [M] int64
    trunk_labels: Tensor  # [M] int64
    on_policy: bool = False  # sampled by the very weights that are trained: importance weights are exactly 1
    asked: Sequence[
        frozenset[int]
    ] = ()  # for each of `documents`, the tokens before which groups of the step think

    def to(self, device: torch.device | str) -> MicroBatch:
        """The same micro-batch with its tensors on `device`."""
        moved = {
            n: v.to(device) for n in self.__dataclass_fields__ if isinstance(v := getattr(self, n), Tensor)
        }
        return replace(self, **moved)


@dataclass(frozen=True, slots=True)
class Scores:
    """Log-probabilities (nats) of one micro-batch: thoughts at the sampling temperature, all else at
    temperature 1.
    """

    thought_logps: Tensor  # [B, G, L], with gradient
    target_logps: Tensor  # [B, G, T], after the thought; with gradient
    baseline_logps: Tensor  # [B, T], without the thought; no gradient
    trunk_logps: Tensor  # [M], with gradient
    target_mask: Tensor  # [B, T] bool
    counted: Tensor  # [B, G] bool
    trunk_entropies: Tensor | None = (
        None  # [M] nats, of the predictions of the trunk; only where they were asked for
    )
    target_hits: Tensor | None = (
        None  # [B, G, T] bool, the target token is the likeliest; only where asked for
    )
    baseline_hits: Tensor | None = None  # [B, T] bool, the same without the thought
    trunk_reference: Tensor | None = None  # [M], the frozen initial model's; only with need "reference"
    thought_reference: Tensor | None = None  # [B, G, L], likewise, at the sampling temperature

    def detached(self) -> Scores:
        """The same numbers without their graph: what rewards may see."""
        tensors = {n: getattr(self, n) for n in self.__dataclass_fields__}
        return replace(self, **{n: tensor.detach() for n, tensor in tensors.items() if tensor is not None})
