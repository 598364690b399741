"""The three terms of the loss, each a sum over one micro-batch; the loop divides by the step's global counts.

Legend: B positions, G thoughts, L thought tokens, T target tokens, M trunk tokens.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from rewards import importance_ratio
from rlpretrain.config import LossConfig
from rlpretrain.types import MicroBatch, Scores


def clipped_surrogate(
    scores: Scores, micro: MicroBatch, advantage: Float[Tensor, "B G"], config: LossConfig,
    old_logps: Float[Tensor, "B G L"] | None = None,
) -> tuple[Tensor, dict[str, float]]:  # fmt: skip
    """Minus the clipped policy-gradient objective of RLP (arXiv 2510.01265, eq. 8; PPO's, arXiv 1707.06347), and diagnostics.

    Each thought token weighs `micro.token_weights` (1/|c| for RLP, 1 for a policy gradient: `loss.reduction`). The ratio is
    taken against `old_logps` (this very forward when None: ratio exactly 1), and what another engine or an older policy
    sampled enters with the truncated weight exp(old - behaviour). Only log-probs of sampled thought tokens carry gradient.
    """
    new = scores.thought_logps
    old = new.detach() if old_logps is None else old_logps
    weight = micro.token_weights
    info: dict[str, float] = {}
    if not micro.on_policy:
        sampling = importance_ratio(old, micro.behaviour_logps, micro.thought_mask, cap=config.importance_cap)
        weight = weight * sampling.truncated
        info = {f"sampling/{k}": float(v) for k, v in sampling.diagnostics.items()}
    ratio = torch.exp(new - old)
    bounded = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    gain = advantage.to(new.dtype)[:, :, None]
    objective = torch.minimum(ratio * gain, bounded * gain)
    if old_logps is not None and bool(micro.thought_mask.any()):
        clipped = ((ratio * gain > bounded * gain) & micro.thought_mask).sum() / micro.thought_mask.sum()
        info["clip_ratio/region_mean"] = float(clipped)
    return -(objective * weight * micro.thought_mask).sum(), info


def target_loss(scores: Scores, weights: Float[Tensor, "B G T"]) -> Tensor:
    """Sum of weights × −log p(target | context, thought): the direct term (reader, VeriFree, JEPO), absent from RLP's paper."""
    counted = scores.target_mask[:, None, :] & scores.counted[:, :, None]
    return -(weights * scores.target_logps * counted).sum()


def ntp_loss(scores: Scores, weights: Float[Tensor, " M"]) -> Tensor:
    """Sum of weights × −log p(token | document so far) over the trunk: next-token prediction, interleaved."""
    return -(weights * scores.trunk_logps).sum()
