"""Likelihood rewards: the log-probability, probability or perplexity of the true target after a thought.

Shapes: B positions, G thoughts per position, T target tokens. Everything is computed in float64. A thought
with no counted token gets NaN: not applicable. Nothing is detached here: the caller passes detached
log-probs.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from rewards.advantages import leave_one_out
from rewards.masks import TargetMask, expand_mask

VR_CLI_STEPS = ((0.05, 0.5), (1.0, 0.9), (2.0, 1.0))
"""VR-CLI's steps: (threshold of the improvement in percent, reward above it), arXiv 2503.22828."""


def target_logp(
    target_logps: Float[Tensor, "B G T"], mask: TargetMask = None, *, mean: bool = False
) -> Float[Tensor, "B G"]:
    """Return log p(target | context, thought) in nats: the sum over the target's tokens, or their mean.

    It neither vanishes on long targets nor needs a scale, unlike the other likelihood rewards (arXiv
    2602.03979). Its leave-one-out advantage is RLP's: the baseline that a position's thoughts share cancels.

    >>> target_logp(torch.tensor([[[-1.0, -3.0]]]), mean=True)
    tensor([[-2.]], dtype=torch.float64)
    """
    logps, counted = _counted(target_logps, mask)
    count = counted.sum(-1)
    total = torch.where(counted, logps, 0.0).sum(-1)
    return torch.where(count > 0, total / count if mean else total, torch.nan)


def target_probability(
    target_logps: Float[Tensor, "B G T"], mask: TargetMask = None, *, mean: bool = False
) -> Float[Tensor, "B G"]:
    """Return p(target | context, thought): of the whole target (VeriFree), or the mean of its tokens' (RLPR).

    The product vanishes on long targets. The mean does not, but a few easy tokens dominate it.
    Source: VeriFree, arXiv 2505.21493; RLPR, arXiv 2506.18254.

    >>> target_probability(torch.tensor([[[0.5, 0.25]]]).log())
    tensor([[0.1250]], dtype=torch.float64)
    """
    if not mean:
        return target_logp(target_logps, mask).exp()
    logps, counted = _counted(target_logps, mask)
    count = counted.sum(-1)
    total = torch.where(counted, logps.exp(), 0.0).sum(-1)
    return torch.where(count > 0, total / count, torch.nan)


def log_complement(logps: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Return log(1 − p) from log p, accurate for small and for large p; in the dtype of `logps`.

    log p is taken to be at most −eps, the dtype's resolution: where p rounds to 1 the result is log(eps),
    about −16 in float32, and the gradient is that at −eps, so that both are finite.

    >>> log_complement(torch.tensor([0.5, 1.0]).log())
    tensor([ -0.6931, -15.9424])
    """
    most = -torch.finfo(logps.dtype).eps
    bounded = logps + (logps.clamp(max=most) - logps).detach()  # clamp alone has no gradient at p = 1
    is_small = bounded < -math.log(2)
    # Each branch gets values that it can take: a gradient that is not finite would spoil the sum.
    small = torch.log1p(-torch.exp(torch.where(is_small, bounded, -1.0)))
    large = torch.log(-torch.expm1(torch.where(is_small, -0.5, bounded)))
    return torch.where(is_small, small, large)


def debiased_probability(
    target_logps: Float[Tensor, "B G T"], baseline_logps: Float[Tensor, "B T"], mask: TargetMask = None
) -> Float[Tensor, "B G"]:
    """Return RLPR's reward: mean token probability with the thought minus that without, clipped to [0, 1].

    Clipping at 0 makes all harmful thoughts equal: nothing is learned at a position without a helpful
    thought. Source: RLPR, arXiv 2506.18254.

    >>> debiased_probability(torch.tensor([[[0.5], [0.1]]]).log(), torch.tensor([[0.2]]).log())
    tensor([[0.3000, 0.0000]], dtype=torch.float64)
    """
    without = baseline_logps.unsqueeze(1).expand_as(target_logps)
    gain = target_probability(target_logps, mask, mean=True) - target_probability(without, mask, mean=True)
    return gain.clamp(0, 1)


def perplexity_gain(
    target_logps: Float[Tensor, "B G T"],
    baseline_logps: Float[Tensor, "B T"],
    mask: TargetMask = None,
    *,
    steps: Sequence[tuple[float, float]] | None = None,
) -> Float[Tensor, "B G"]:
    """Return the target's fall in perplexity due to the thought, in percent: 100 · (1 − PPL with / without).

    `steps` turns it into a step function: the reward of the highest threshold that the percentage exceeds,
    else 0. Source: VR-CLI, arXiv 2503.22828 (with `VR_CLI_STEPS`).

    >>> perplexity_gain(torch.tensor([[[-1.0], [-1.1]]]), torch.tensor([[-1.1]])).round(decimals=4)
    tensor([[9.5163, 0.0000]], dtype=torch.float64)
    """
    without = baseline_logps.unsqueeze(1).expand_as(target_logps)
    ratio = (target_logp(without, mask, mean=True) - target_logp(target_logps, mask, mean=True)).exp()
    percent = 100 * (1 - ratio)
    if steps is None:
        return percent
    reward = torch.zeros_like(percent)
    for threshold, value in sorted(steps):
        reward = torch.where(percent > threshold, value, reward)
    return torch.where(percent.isnan(), torch.nan, reward)


def multi_sample_bound(
    logps: Float[Tensor, "B G"], samples: int | None = None
) -> tuple[Float[Tensor, "B G"], Float[Tensor, "B G"]]:
    """Return (advantages, weights of the direct term) of JEPO's bound: log mean exp over `samples` thoughts.

    `logps` are log p(target | context, thought); NaN: not applicable. The G thoughts are divided into turns
    of `samples` thoughts (None: one turn of all G). Each turn has its own bound L, which is tighter with more
    thoughts. With m valid thoughts in a turn,

        advantage of thought i = m · (L − L without i)
        weight of log p of thought i = m · softmax(logps)[i]

    Take the mean over thoughts of advantage · Σ log π(token) + weight · log p. On-policy, its expected
    gradient is the gradient of the mean bound. That holds for the sum over a thought's tokens
    (`loss.reduction: sum`), not for their mean. With one sample, L without it does not exist: the baseline is
    the mean of the other thoughts, so the advantage is `leave_one_out(logps)` and the weight 1.

    Raises:
        ValueError: `samples` below 1, or G not a multiple of it; G < 2 with one sample.

    Source: JEPO, arXiv 2503.19618 (the multi-sample bound with leave-one-out control variates).

    >>> multi_sample_bound(torch.tensor([[0.5, 0.1]]).log())[0]  # 2 · (ln .3 − ln .1), 2 · (ln .3 − ln .5)
    tensor([[ 2.1972, -1.0217]])
    """
    size = logps.shape[1] if samples is None else samples
    if size < 1 or logps.shape[1] % size:
        raise ValueError(f"{logps.shape[1]} thoughts cannot be taken in turns of {size}")
    valid = ~logps.isnan()
    if size == 1:
        return leave_one_out(logps), valid.to(logps.dtype)
    turns = logps.double().unflatten(1, (-1, size))  # [B, turns, m]
    valid_turns = valid.unflatten(1, (-1, size))
    count = valid_turns.sum(-1, keepdim=True).double()
    filled = torch.where(valid_turns, turns, -torch.inf)
    log_sum = filled.logsumexp(-1, keepdim=True)
    bound = log_sum - count.clamp(min=1).log()
    itself = torch.eye(size, dtype=torch.bool, device=logps.device)
    others = torch.where(itself, -torch.inf, filled.unsqueeze(-2))
    bound_without = others.logsumexp(-1) - (count - 1).clamp(min=1).log()
    equal = bound == bound_without  # both may be −inf
    change = torch.where(equal, 0.0, bound - bound_without)
    advantage = torch.where(valid_turns & (count > 1), count * change, 0.0)
    weight = (count * (filled - log_sum).exp()).nan_to_num(0.0)
    return advantage.flatten(1).to(logps.dtype), weight.flatten(1).to(logps.dtype)


def _counted(logps: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the float64 log-probs and which of them count, both [B, G, T]."""
    if logps.ndim != 3:
        raise ValueError(f"target_logps {tuple(logps.shape)} must be [B, G, T]")
    if mask is None:
        return logps.double(), torch.ones_like(logps, dtype=torch.bool)
    return logps.double(), expand_mask(mask, logps)
