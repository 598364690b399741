"""How much a thought helped: log p(target | context, thought) − log p(target | context).

Shapes: B positions, G thoughts per position, T target tokens. Unit: nats.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from rewards.masks import TargetMask, expand_mask


def information_gain(
    target_logps: Float[Tensor, "B G T"],
    baseline_logps: Float[Tensor, "B T"],
    mask: TargetMask = None,
    *,
    discount: float = 1.0,
    reduction: str = "sum",
    clip: float | None = None,
) -> Float[Tensor, "B G"]:
    """Return each thought's information gain: Σₖ γᵏ · (target_logps[k] − baseline_logps[k]), in float64 nats.

    Positive if the thought made the document's own next tokens more likely, 0 if the model ignored it. With
    T = 1 it is RLP's reward. γ = `discount` weights later tokens; γ = 0 gives T = 1 again. Both arms are
    log-probabilities of the same target ids at temperature 1. RLP treats the reward as a constant. Nothing is
    detached here: the caller passes detached log-probs (`scores.detached()`).

    Exactness: differences are computed in float64. They are exact for float32 log-probs that are 0 or between
    2⁻²³ and 128 nats in size, which is what an fp32 log-softmax yields. The baseline then cancels in the
    advantage without rounding: always for T = 1, and for sums over T with discount 1 until they need more
    than 53 bits. Clipping, a discount within (0, 1) and "mean" round after the subtraction; the remainder is
    then below 1e-15 of the gain.

    Args:
        mask: True counts a target token; for each position, or for each thought. Other tokens may hold any
            value.
        discount: γ in [0, 1]; k counts from the target's first token, masked or not.
        reduction: "sum", or "mean": divided by the sum of γᵏ over the counted tokens.
        clip: bounds each token's difference to ±clip nats, before γ. Log-ratios of rare tokens are unbounded.

    A thought with no counted token (or none of positive weight) gets NaN: not applicable. A target that is
    impossible (−inf) in both arms counts 0. In one arm only, the gain is ∓inf unless clipped. NaN log-probs
    give NaN.

    Raises:
        ValueError: shapes that do not fit, discount outside [0, 1], clip ≤ 0, an unknown reduction.

    Source: RLP, arXiv 2510.01265, §2, the reward r(c) (one target token); clip, mean and masks are our
    additions.

    >>> information_gain(torch.tensor([[[-1.0], [-2.0]]]), torch.tensor([[-1.5]]))
    tensor([[ 0.5000, -0.5000]], dtype=torch.float64)
    """
    if target_logps.ndim != 3 or baseline_logps.shape != target_logps.shape[::2]:
        raise ValueError(
            f"target_logps {tuple(target_logps.shape)} and baseline_logps {tuple(baseline_logps.shape)} "
            "must be [B, G, T] and [B, T]: one baseline per position, shared by its thoughts"
        )
    if not 0 <= discount <= 1 or reduction not in ("sum", "mean") or (clip is not None and not clip > 0):
        raise ValueError(
            f"discount {discount} must lie in [0, 1], reduction {reduction!r} must be 'sum' or 'mean', "
            f"clip {clip} must be None or above 0"
        )
    with_thought, without = target_logps.double(), baseline_logps.double().unsqueeze(1)
    both_impossible = (with_thought == without) & with_thought.isinf()
    gain = torch.where(both_impossible, 0.0, with_thought - without)
    if clip is not None:
        gain = gain.clamp(-clip, clip)

    steps = torch.arange(gain.shape[-1], dtype=gain.dtype, device=gain.device)
    weights = torch.pow(discount, steps).expand_as(gain)
    if mask is not None:
        weights = weights * expand_mask(mask, gain)
    total = weights.sum(-1)
    reduced = torch.where(weights > 0, weights * gain, 0.0).sum(-1)
    return torch.where(total > 0, reduced / total if reduction == "mean" else reduced, torch.nan)
