"""Importance ratios: how far the trained policy has moved from the policy that sampled.

Shapes: ``...`` any shape of tokens, usually [B, G, L] (positions, thoughts, thought tokens).
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

_LIMIT = 80.0  # nats: exp(80) = 5.5e34 fits fp32, and so does its product with a reward


@dataclass(frozen=True, slots=True)
class ImportanceRatio:
    """Ratios per token before and after truncation, with diagnostics.

    `raw` and `truncated` are 0 where the mask is False. `diagnostics` (over the counted, finite ratios; NaN
    if there are none):

    - `raw_mean`, `raw_min`, `raw_max`, and the same with `truncated_`; a healthy mean is near 1;
    - `raw_ess`, `truncated_ess`: effective sample size (Σw)² / (n Σw²): 1 if all weights are equal, 1/n if
      one weight dominates;
    - `truncated_fraction`: the share of tokens above the cap;
    - `abs_log_ratio_mean`, `abs_log_ratio_max`: |logps − reference_logps| in nats;
    - `tokens`: the number of counted tokens; `nonfinite`: how many of them are NaN. Stop the run if it is
      not 0.
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
    """Return exp(logps − reference_logps) per token, raw and truncated to at most `cap`, with diagnostics.

    It has two uses. The ratio of the current policy to the policy at the start of the batch is the
    surrogate's ratio: exactly 1 on the first step, and differentiable in `logps`. The ratio of the trainer's
    old log-probs to the engine's (`behaviour_logps`) is the weight that corrects for different arithmetic or
    an older version of the weights; truncate it (2 is usual) and detach the log-probs. Both log-probs must be
    at the same temperature.

    fp32 (float64 for float64 inputs). Log-ratios are clamped to ±80 nats so that nothing overflows. A NaN of
    a counted token stays NaN in `raw` and `truncated` and is counted. Tokens that do not count may hold any
    value and get no gradient. −inf in both arms is NaN. A truncated token has no gradient through
    `truncated`. Tensors without tokens are allowed.

    Raises:
        ValueError: shapes that differ, or a cap of 0 or less.

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
    common_dtype = torch.promote_types(logps.dtype, reference_logps.dtype)
    dtype = torch.promote_types(common_dtype, torch.float32)
    counted = torch.ones_like(logps, dtype=torch.bool) if mask is None else mask
    current = logps.to(dtype).where(counted, 0.0)
    reference = reference_logps.to(dtype).where(counted, 0.0)
    log_ratio = (current - reference).clamp(-_LIMIT, _LIMIT)
    raw = torch.where(counted, log_ratio.exp(), 0.0)
    truncated = raw if cap is None else raw.clamp(max=cap)
    return ImportanceRatio(raw, truncated, _diagnostics(raw, truncated, log_ratio, counted))


@torch.no_grad()
def _diagnostics(raw: Tensor, truncated: Tensor, log_ratio: Tensor, counted: Tensor) -> dict[str, float]:
    """Return the entries of `ImportanceRatio.diagnostics`."""
    usable = counted & ~log_ratio.isnan()
    tokens = int(counted.sum())
    nonfinite = int((counted & ~usable).sum())
    values: dict[str, Tensor] = {}
    for name, ratio in (("raw", raw[usable].double()), ("truncated", truncated[usable].double())):
        values[f"{name}_mean"] = ratio.mean()
        values[f"{name}_min"], values[f"{name}_max"] = _extremes(ratio)
        values[f"{name}_ess"] = ratio.sum().square() / (ratio.square().sum() * ratio.numel())
    values["truncated_fraction"] = (truncated[usable] < raw[usable]).double().mean()
    distance = log_ratio[usable].double().abs()
    values["abs_log_ratio_mean"] = distance.mean()
    values["abs_log_ratio_max"] = _extremes(distance)[1]
    numbers = torch.stack(list(values.values())).tolist()  # one copy to the host
    return dict(zip(values, numbers, strict=True)) | {"tokens": float(tokens), "nonfinite": float(nonfinite)}


def _extremes(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return (minimum, maximum); NaN for no values."""
    if values.numel() == 0:
        nan = values.new_full((), math.nan)
        return nan, nan
    return values.min(), values.max()
