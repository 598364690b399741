"""The data that flows inside the trainer: token ids up to a MicroBatch, tensors from there on.

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
    """What one step trains on: groups, and the documents whose next-token loss is taken.

    A document that was drawn twice is in `documents` twice. `progress` is the share of the run that is done
    with this batch, 0 to 1. Raises ValueError if two different documents have the same id, or two groups:
    ids join groups to their documents, and the parts of a split group to each other.
    """

    groups: Sequence[Group]
    documents: Sequence[Document]
    progress: float = 0.0

    def __post_init__(self) -> None:
        known: dict[str, Document] = {}
        for document in self.documents:
            if known.setdefault(document.id, document).token_ids != document.token_ids:
                raise ValueError(
                    f"two documents of a batch have the id {document.id!r} but different tokens: ids must be "
                    "unique"
                )
        ids = [group.id for group in self.groups]
        if len(set(ids)) < len(ids):
            repeated = next(id_ for id_ in ids if ids.count(id_) > 1)
            raise ValueError(f"two groups of a batch have the id {repeated!r}: ids must be unique")


@dataclass(frozen=True, slots=True)
class Totals:
    """Denominators of a step, counted over all its micro-batches and all ranks before the first forward."""

    thoughts: float
    thought_tokens: float
    trunk: float


@dataclass(frozen=True, slots=True)
class Window:
    """The largest numbers of tokens that a document of some length leads to; see `Objective.window`."""

    prompt: int
    """Tokens of a prompt, open tag included."""
    sampled: int
    """Tokens of a prompt with its thought and answer: the context length that an engine needs."""
    row: int
    """Tokens of a whole row, with an injected close tag and the target: the length that the model needs."""


@dataclass(frozen=True, slots=True)
class Arm:
    """The no-think arm alone, padded: the input of the frozen and EMA baselines, which score nothing else."""

    input_ids: Tensor  # [A, W] int64
    attention_mask: Tensor  # [A, W] int64
    rows: Tensor  # [B, T] int64 into the flattened states; -1 beyond a target


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Groups and their documents, laid out for one forward.

    `tree` is None for the padded layout. A thought that is not `counted` (cut off under `cut: mask`, aborted)
    is in neither the input nor the loss. `token_weights` holds the reduction within and over thoughts.
    """

    input_ids: Tensor  # [R, S] int64
    attention_mask: Tensor  # [R, S] int64, 1 counts
    position_ids: Tensor | None  # [R, S], or None where the model's own 0..S-1 is right
    tree: Tree | None
    arm: Arm
    row_tokens: int
    """Tokens of thoughts, contexts, targets and documents, as if nothing were shared or padded."""
    groups: Sequence[Group]
    documents: Sequence[Document]
    """Documents whose next-token loss is taken here, in the order of `trunk_rows`, as often as drawn."""
    offsets: Sequence[int]
    """[B] The index of each group's first thought in the whole group; above 0 only if the group is split."""
    thought_rows: Tensor  # [B, G, L] int64
    thought_labels: Tensor  # [B, G, L] int64
    thought_mask: Tensor  # [B, G, L] bool, true for sampled tokens of counted thoughts
    token_weights: Tensor  # [B, G, L] float32
    behaviour_logps: Tensor  # [B, G, L] float32
    given: Tensor  # [B, G] bool, true for counted thoughts that come from the data
    counted: Tensor  # [B, G] bool
    penalty: Tensor  # [B, G] float32, nats subtracted from an unclosed thought's reward under `cut: penalise`
    target_rows: Tensor  # [B, G, T] int64
    target_labels: Tensor  # [B, T] int64
    target_mask: Tensor  # [B, T] bool
    baseline_rows: Tensor  # [B, T] int64, the no-think arm; -1 where the layout has none
    trunk_rows: Tensor  # [M] int64
    trunk_labels: Tensor  # [M] int64
    on_policy: bool = False
    """The thoughts were sampled with the weights that are trained, so importance weights are exactly 1."""
    asked: Sequence[frozenset[int]] = ()
    """For each of `documents`, the indices of the tokens before which groups of the step think."""
    soft_ids: Tensor | None = None
    """[M, K] int64 tokens of the soft targets, -1 for the whole vocabulary, -100 for none; None without."""
    soft_probs: Tensor | None = None
    """[M, K] float32, the probability of each in the loss."""

    def to(self, device: torch.device | str) -> MicroBatch:
        """The same micro-batch with its tensors on `device`."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        moved = {name: value.to(device) for name, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **moved)


@dataclass(frozen=True, slots=True)
class SoftTargets:
    """What each document token of a micro-batch is trained on in place of the token itself.

    A row's loss is −Σ_k probs[k] · log p(ids[k]): give the document's own token too where it shall count. An
    id may be −1, the whole vocabulary: its log-prob is the mean over all tokens. Entries with probability 0
    are not read.
    """

    ids: Tensor  # [M, K] int64
    probs: Tensor  # [M, K]


@dataclass(frozen=True, slots=True)
class Likeliest:
    """The K likeliest tokens of a model's prediction of each document token, likeliest first."""

    ids: Tensor  # [M, K] int64
    logps: Tensor  # [M, K] nats, over the whole vocabulary, at the temperature that was asked for
    own_logps: Tensor | None = None
    """[M] nats, of the document token itself; only of the trained model (need "learner")."""


@dataclass(frozen=True, slots=True)
class Scores:
    """Log-probabilities (nats) of one micro-batch.

    Thoughts are scored at the sampling temperature, everything else at temperature 1.
    """

    thought_logps: Tensor  # [B, G, L], with gradient
    target_logps: Tensor  # [B, G, T], after the thought; with gradient
    baseline_logps: Tensor  # [B, T], without the thought; no gradient
    trunk_logps: Tensor  # [M], with gradient
    target_mask: Tensor  # [B, T] bool
    counted: Tensor  # [B, G] bool
    trunk_entropies: Tensor | None = None
    """[M] nats, entropies of the trunk's predictions; only on request."""
    target_hits: Tensor | None = None
    """[B, G, T] bool, whether the target token is the likeliest; only on request."""
    baseline_hits: Tensor | None = None
    """[B, T] bool, the same without the thought."""
    trunk_reference: Tensor | None = None
    """[M] `trunk_logps` under the frozen reference model; only with need "reference"."""
    thought_reference: Tensor | None = None
    """[B, G, L] `thought_logps` under the frozen reference model; only with need "reference"."""
    target_baseline: Tensor | None = None
    """[B, G, T] `target_logps` under the model of `baseline`; only with need "target_baseline"."""
    trunk_initial: Tensor | None = None
    """[M] `trunk_logps` under the frozen initial model; only with need "initial"."""
    soft_logps: Tensor | None = None
    """[M, K] log-probs of the micro-batch's `soft_ids`, with gradient; only where it has soft targets."""
    balance: Tensor | None = None
    """How unevenly the experts of a mixture were used, with gradient; only with `loss.router_coef`."""

    def detached(self) -> Scores:
        """The same numbers without their graph: what rewards may see."""
        tensors = {name: getattr(self, name) for name in self.__dataclass_fields__}
        detached = {name: tensor.detach() for name, tensor in tensors.items() if tensor is not None}
        return replace(self, **detached)
