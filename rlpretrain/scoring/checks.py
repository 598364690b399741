"""Checks of a model before it is trained: tree packing, head, attention kernel, determinism."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rlpretrain.compat import attention_of, forward_of
from rlpretrain.models.kernels import PREFIX, attending_by, check_kernel
from rlpretrain.models.randomness import check_deterministic, in_mode
from rlpretrain.ranks import Ranks
from rlpretrain.scoring.groups import BatchScores, ScoreFunction, micro_batches, score_batch
from rlpretrain.scoring.packing import Layout
from rlpretrain.scoring.scorer import Scorer
from rlpretrain.types import Batch, MicroBatch, Totals

ENOUGH = 100
"""Tokens of a kind whose mean difference is not one of a few unlikely tokens."""


@torch.no_grad()
def check_tree(
    policy: Any, micro: MicroBatch, layout: Layout, totals: Totals, ranks: Ranks, half: bool = False
) -> float:
    """Difference (nats) over all ranks between log-probs of a tree and of the same rows padded.

    It is the largest of a token; with `half` precision, whose rounding reaches .7 nats on a few tokens of
    SmolLM2-135M, the largest mean of a kind of tokens. All ranks call it. Raises ValueError above 1e-3 (a
    mean of .1). Either the model mixes tokens outside attention, or by an attention pattern that tree packing
    does not support. Or the padded rows are wrong, because their kernel leaves out a part of the attention:
    scoring them again with `eager` tells which.
    """
    limit = limit_of_difference(half)
    difference, padded, padded_scores = _against_padded(policy.score, micro, layout, totals, ranks, half)
    if difference <= limit:
        return difference
    kernel = attention_of(policy.model).removeprefix(PREFIX)
    with attending_by(policy.model, "eager"):
        eager_scores = score_batch(policy.score, padded, ranks.device)
    kernel_difference = ranks.max([_difference(padded_scores, eager_scores, half)])[0]
    how = "on average by" if half else "by up to"
    message = f"log-probs of packed trees differ from those of padded rows {how} {difference:.2e} nats"
    if not kernel_difference <= limit:
        raise ValueError(
            f"{message}, and on the padded rows attention {kernel} differs from eager {how} "
            f"{kernel_difference:.2e}: {kernel} leaves out a part of the model, in sampling too. Set "
            "model.attn_implementation: eager"
        )
    raise ValueError(
        f"{message}: the model mixes tokens in a way that tree packing does not support. Its padded rows are "
        "right (they agree with eager attention): train it with packing: padded"
    )


def fits_trees(
    score: ScoreFunction, micro: MicroBatch, layout: Layout, ranks: Ranks, half: bool = False
) -> bool:
    """Whether a tree's log-probs are those of padded rows, on all ranks, which all call it."""
    return _against_padded(score, micro, layout, None, ranks, half)[0] <= limit_of_difference(half)


def limit_of_difference(half: bool) -> float:
    """How far (nats) rounding may set trees and padded rows apart: a token, in `half` precision a mean."""
    return 0.1 if half else 1e-3


def _against_padded(
    score: ScoreFunction, micro: MicroBatch, layout: Layout, totals: Totals | None, ranks: Ranks, half: bool
) -> tuple[float, list[MicroBatch], BatchScores]:
    """The largest `_difference` over ranks, and the padded rows with their scores."""
    padded = micro_batches(Batch(micro.groups, micro.documents), replace(layout, tree=False), ranks, totals)
    tree_scores = score_batch(score, [micro], ranks.device)
    padded_scores = score_batch(score, padded, ranks.device)
    return ranks.max([_difference(tree_scores, padded_scores, half)])[0], padded, padded_scores


def _difference(ours: BatchScores, theirs: BatchScores, half: bool) -> float:
    """Difference of the log-probs of the same groups and documents (nats); inf where one is NaN.

    The largest of a token. In `half` precision the largest mean: of all tokens, and of each kind of which
    there are enough.
    """
    kinds = [part for part in _differences(ours, theirs) if part.numel()]
    if half:
        kinds = [torch.cat([torch.zeros(0), *kinds]), *(part for part in kinds if part.numel() >= ENOUGH)]
    worst = [float(part.mean() if half else part.max()) for part in kinds if part.numel()]
    return max((math.inf if math.isnan(value) else value for value in worst), default=0.0)


def _differences(ours: BatchScores, theirs: BatchScores) -> list[Tensor]:
    """Absolute differences [n] of the tokens of thoughts, of targets after them and without, of documents."""
    pairs = [(ours.groups[id_], other) for id_, other in theirs.groups.items()]
    of_groups = [
        [(own.thought_logps, other.thought_logps) for own, other in pairs],
        [(own.target_logps, other.target_logps) for own, other in pairs],
        [(own.baseline_logps, other.baseline_logps) for own, other in pairs],
    ]
    of_documents = [(ours.documents[id_].logps, other.logps) for id_, other in theirs.documents.items()]
    return [
        torch.cat([torch.zeros(0), *((a.float() - b.float()).abs().flatten().cpu() for a, b in kind)])
        for kind in (*of_groups, of_documents)
    ]


def check_model(model: nn.Module) -> None:
    """Check a model before it is trained or evaluated; ConfigError or ValueError says what is wrong.

    Its forward must not be random, its attention kernel must compute its attention, and our log-probs must be
    those of its own logits.
    """
    check_deterministic(model)
    check_kernel(model)
    check_head(model)


@torch.no_grad()
def check_head(model: Any, tolerance: float = 1e-3) -> float:
    """Largest difference between our log-probabilities and those of the model's own logits, on a few tokens.

    Raises ValueError above `tolerance` (scaled for half precision and autocast): the model transforms its
    logits in a way that `compat` does not support, so every score would be wrong.
    """
    weight = model.get_output_embeddings().weight
    ids = torch.arange(1, 9, device=weight.device)[None] % weight.shape[0]
    ones = torch.ones_like(ids)
    rows = torch.arange(ids.shape[1] - 1, device=ids.device)
    with in_mode(model, training=False):
        gold = forward_of(model)(input_ids=ids, attention_mask=ones).logits.float().log_softmax(-1)[0, :-1]
        ours, _ = Scorer(model)(ids, ones, None, rows, ids[0, 1:])
    gold = gold.gather(-1, ids[0, 1:, None])[:, 0]
    difference = float((gold - ours).abs().max())
    half = weight.dtype != torch.float32 or torch.is_autocast_enabled(weight.device.type)
    if not difference <= tolerance * (300 if half else 1):
        raise ValueError(
            f"{type(model).__name__}: log-probabilities from hidden states differ from its own logits by "
            f"{difference:.3g} nats: it transforms its logits in a way that rlpretrain.compat.head_of does "
            "not support"
        )
    return difference
