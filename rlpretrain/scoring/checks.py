"""What is checked before a model is trained: its trees, its head, its kernel, and that nothing in it is
random.
"""

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
from rlpretrain.scoring.groups import BatchScores, micro_batches, score_batch
from rlpretrain.scoring.packing import Layout
from rlpretrain.scoring.scorer import Scorer
from rlpretrain.types import Batch, MicroBatch, Totals


@torch.no_grad()
def check_tree(
    policy: Any, micro: MicroBatch, layout: Layout, totals: Totals, ranks: Ranks, half: bool = False
) -> float:
    """Largest difference (nats) over all ranks between the log-probs that a policy gives of a tree and of the
    same rows padded.

    All ranks call it. Raises ValueError above 1e-3 (.3 with `half` precision): the model lets tokens meet
    elsewhere than in attention, or attends by rules that the tree does not know. Or it is the padded rows
    that are wrong, since their kernel leaves a part of the attention out: they are scored once more by
    `eager` to tell.
    """
    padded = micro_batches(Batch(micro.groups, micro.documents), replace(layout, tree=False), ranks, totals)
    most = 0.3 if half else 1e-3
    ours = score_batch(policy.score, [micro], ranks.device)
    theirs = score_batch(policy.score, padded, ranks.device)
    worst = ranks.max([_apart(ours, theirs)])[0]
    if worst <= most:
        return worst
    said = f"this model gives other log-probs on packed trees than on padded rows (up to {worst:.2e} nats)"
    kernel = attention_of(policy.model).removeprefix(PREFIX)
    with attending_by(policy.model, "eager"):
        reference = score_batch(policy.score, padded, ranks.device)
    off = ranks.max([_apart(theirs, reference)])[0]
    if not off <= most:
        raise ValueError(
            f"{said}, and by attention {kernel} other ones than by eager on the same padded rows (up to "
            f"{off:.2e}): {kernel} leaves out a part of the model, in sampling too. Set "
            "model.attn_implementation: eager"
        )
    raise ValueError(
        f"{said}: it lets tokens meet by rules that tree attention does not know. Its padded rows are those "
        "of eager attention: train it with packing: padded"
    )


def _apart(ours: BatchScores, theirs: BatchScores) -> float:
    """Largest difference of the log-probs of the same groups and documents; inf where one is NaN."""
    pairs: list[tuple[Tensor, Tensor]] = []
    for id_, other in theirs.groups.items():
        own = ours.groups[id_]
        pairs += [
            (getattr(own, name), getattr(other, name))
            for name in ("thought_logps", "target_logps", "baseline_logps")
        ]
    pairs += [(ours.documents[id_].logps, other.logps) for id_, other in theirs.documents.items()]
    apart = [float((a.float() - b.float()).abs().max()) for a, b in pairs if b.numel()]
    return max((math.inf if math.isnan(a) else a for a in apart), default=0.0)


def check_model(model: nn.Module) -> None:
    """What is asked of every model before it is trained or evaluated: ConfigError or ValueError that says
    what is wrong.

    Its forward is not random, its attention kernel computes its attention, and our log-probs are those of its
    own logits.
    """
    check_deterministic(model)
    check_kernel(model)
    check_head(model)


@torch.no_grad()
def check_head(model: Any, tolerance: float = 1e-3) -> float:
    """Largest difference between our log-probabilities and those of the model's own logits, on a few tokens.

    Raises ValueError above `tolerance` (scaled for half precision and autocast): the model does something to
    its logits that `compat` does not know, and every score would be wrong.
    """
    weight = model.get_output_embeddings().weight
    ids = torch.arange(1, 9, device=weight.device)[None] % weight.shape[0]
    ones = torch.ones_like(ids)
    rows = torch.arange(ids.shape[1] - 1, device=ids.device)
    with in_mode(model, training=False):
        gold = forward_of(model)(input_ids=ids, attention_mask=ones).logits.float().log_softmax(-1)[0, :-1]
        ours, _ = Scorer(model)(ids, ones, None, rows, ids[0, 1:])
    gold = gold.gather(-1, ids[0, 1:, None])[:, 0]
    worst = float((gold - ours).abs().max())
    half = weight.dtype != torch.float32 or torch.is_autocast_enabled(weight.device.type)
    if not worst <= tolerance * (300 if half else 1):
        raise ValueError(
            f"{type(model).__name__}: log-probabilities from hidden states differ from its own logits by "
            f"{worst:.3g} nats; it transforms its logits in a way that rlpretrain.compat.head_of does not "
            "know"
        )
    return worst
