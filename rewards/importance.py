"""How far the policy that is trained has moved from the one that sampled.

Shapes: ``...`` any shape of tokens, usually [B, G, L] (positions, thoughts, thought tokens).
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

_LIMIT = 80.0  # nats; exp(80) = 5.5e34 still fits fp32, and so does its product with a reward


@dataclass(frozen=True, slots=True)
class ImportanceRatio:
    """Ratios per token before and after truncation, and what they look like as plain numbers.

    `raw` and `truncated` are 0 where the mask is False. `diagnostics` (over the counted, finite ratios; NaN
    if none):

    - `raw_mean`, `raw_min`, `raw_max`, and the same with `truncated_`; a healthy mean is near 1;
    - `raw_ess`, `truncated_ess`: effective sample size (Σw)² / (n Σw²), 1 when all weights agree, 1/n when
      one rules;
    - `truncated_fraction`: the share of tokens above the cap;
    - `abs_log_ratio_mean`, `abs_log_ratio_max`: |logps − reference_logps| in nats;
    - `tokens`: how many count; `nonfinite`: how many of those are NaN, which any other value than 0 makes
      worth a stop.
    """

    raw: Float[Tensor, "..."]
    truncated: Float[Tensor, "..."]
    diagnostics: dict[str, float]


def importance_ratio(
    logps: Float[Tensor, "..."],
    reference_logps: Float[Tensor, "..."],
    mask: Bool[Tensor, "..."] | None = None,
    *,
    cap: float | None = None,
) -> ImportanceRatio:
    """Return exp(logps − reference_logps) per token, the same truncated to at most `cap`, and diagnostics of
    both.

    Two uses. With the policy now and the policy when the batch was taken it is the surrogate's ratio: exactly
    1 on the first step, and differentiable in `logps`. With the old log-probs as the trainer computes them
    and those of the engine that sampled (`behaviour_logps`) it is the weight that corrects for another
    engine's arithmetic or an older version; then truncate it (2 is usual) and detach the log-probs. Both must
    be taken at the same temperature.

    fp32 (float64 for float64 inputs). Log-ratios are bounded to ±80 nats so that nothing overflows. A NaN of
    a counted token stays NaN in `raw` and `truncated` and is counted; what is not counted may hold anything
    and gets no gradient. −inf in both arms is NaN. A truncated token has no gradient through `truncated`.
    Tensors of no tokens are fine.

    Raises:
        ValueError: shapes that differ, or a cap that is not above 0.

    Source: the ratio is PPO's, arXiv 1707.06347, §3; the truncated weight min(ratio, cap) is IMPALA's, arXiv
    1802.01561, §4.1; the effective sample size is Kong 1992.

    >>> ratio = importance_ratio(torch.tensor([-1.0, -1.0]), torch.tensor([-1.0, -3.0]), cap=2.0)
    >>> ratio.raw, ratio.truncated, ratio.diagnostics["truncated_fraction"]
    (tensor([1.0000, 7.3891]), tensor([1., 2.]), 0.5)
    """
    if logps.shape != reference_logps.shape or (mask is not None and mask.shape != logps.shape):
        shapes = [tuple(x.shape) for x in (logps, reference_logps, mask) if x is not None]
        raise ValueError(f"logps, reference_logps and mask must have one shape, not {shapes}")
    if cap is not None and not cap > 0:
        raise ValueError(f"cap {cap} must be above 0; use None for no truncation")
    wide = torch.promote_types(torch.promote_types(logps.dtype, reference_logps.dtype), torch.float32)
    counted = torch.ones_like(logps, dtype=torch.bool) if mask is None else mask
    now, then = logps.to(wide).where(counted, 0.0), reference_logps.to(wide).where(counted, 0.0)
    log_ratio = (now - then).clamp(-_LIMIT, _LIMIT)
    raw = torch.where(counted, log_ratio.exp(), 0.0)
    truncated = raw if cap is None else raw.clamp(max=cap)
    return ImportanceRatio(raw, truncated, _diagnostics(raw, truncated, log_ratio, counted))


@torch.no_grad()
def _diagnostics(raw: Tensor, truncated: Tensor, log_ratio: Tensor, counted: Tensor) -> dict[str, float]:
    usable = counted & ~log_ratio.isnan()
    tokens, nonfinite = int(counted.sum()), int((counted & ~usable).sum())
    values: dict[str, Tensor] = {}
    for name, ratio in (("raw", raw[usable].double()), ("truncated", truncated[usable].double())):
        values[f"{name}_mean"] = ratio.mean()
        values[f"{name}_min"], values[f"{name}_max"] = _extremes(ratio)
        values[f"{name}_ess"] = ratio.sum().square() / (ratio.square().sum() * ratio.numel())
    values["truncated_fraction"] = (truncated[usable] < raw[usable]).double().mean()
    distance = log_ratio[usable].double().abs()
    values["abs_log_ratio_mean"], values["abs_log_ratio_max"] = distance.mean(), _extremes(distance)[1]
    numbers = torch.stack(list(values.values())).tolist()  # one copy to the host
    return dict(zip(values, numbers, strict=True)) | {"tokens": float(tokens), "nonfinite": float(nonfinite)}


def _extremes(values: Tensor) -> tuple[Tensor, Tensor]:
    if values.numel() == 0:
        nothing = values.new_full((), math.nan)
        return nothing, nothing
    return values.min(), values.max()
