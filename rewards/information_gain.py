"""How much a thought helped: log p(target | context, thought) − log p(target | context).

Shapes: B positions, G thoughts per position, T target tokens. Unit: nats.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def information_gain(
    target_logps: Float[Tensor, "B G T"],
    baseline_logps: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"] | Bool[Tensor, "B G T"] | None = None,
    *,
    discount: float = 1.0,
    reduction: str = "sum",
    clip: float | None = None,
) -> Float[Tensor, "B G"]:
    """Return each thought's information gain in nats: Σₖ γᵏ · (target_logps[k] − baseline_logps[k]), in
    float64.

    Positive where the thought made the document's own next tokens likelier, 0 where the model ignored it.
    With T = 1 it is RLP's reward; γ = `discount` looks further ahead, 0 being T = 1 again. Both arms are
    log-probabilities at temperature 1 of the same target ids. RLP treats the reward as a constant: nothing is
    detached here, the caller passes log-probs that are (`scores.detached()`).

    Exactness: differences are formed in float64. For float32 log-probs that are 0 or between 2⁻²³ and 128
    nats in size (what an fp32 log-softmax yields) they are exact, so the baseline leaves no trace in the
    advantage, not even rounding: always for T = 1, and for sums over T with discount 1 until they need more
    than 53 bits. Clipping, a discount within (0, 1) and "mean" round after the subtraction; the trace is then
    below 1e-15 of the gain.

    Args:
        mask: True counts a target token; for each position, or for each thought. What is not counted may hold
        anything. discount: γ in [0, 1]; k counts from the target's first token, whether it is masked or not.
        reduction: "sum", or "mean": divided by the sum of γᵏ over the counted tokens. clip: bounds each
        token's difference to ±clip nats, before γ: rare tokens have unbounded log-ratios.

    A thought with no counted token (or none of positive weight) gets NaN: not applicable. A target that is
    impossible (−inf) in both arms counts 0; in one arm only, the gain is ∓inf unless clipped. NaN log-probs
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
            f"discount {discount} must lie in [0, 1], reduction {reduction!r} be 'sum' or 'mean', "
            f"clip {clip} be None or above 0"
        )
    thought, plain = target_logps.double(), baseline_logps.double().unsqueeze(1)
    gain = torch.where((thought == plain) & thought.isinf(), 0.0, thought - plain)
    if clip is not None:
        gain = gain.clamp(-clip, clip)

    weights = torch.pow(
        discount, torch.arange(gain.shape[-1], dtype=gain.dtype, device=gain.device)
    ).expand_as(gain)
    if mask is not None:
        mask = mask.unsqueeze(1) if mask.ndim == 2 else mask
        if mask.shape[::2] != gain.shape[::2] or mask.shape[1] not in (1, gain.shape[1]):
            raise ValueError(f"mask {tuple(mask.shape)} must be [B, T] or [B, G, T] for {tuple(gain.shape)}")
        weights = weights * mask
    total = weights.sum(-1)
    reduced = torch.where(weights > 0, weights * gain, 0.0).sum(-1)
    return torch.where(total > 0, reduced / total if reduction == "mean" else reduced, torch.nan)
