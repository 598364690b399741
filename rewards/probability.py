"""Likelihood rewards: how likely a thought makes the true target, as log-probability, probability or
perplexity.

Shapes: B positions, G thoughts per position, T target tokens. Everything is formed in float64. A thought with
no counted token gets NaN: not applicable. Nothing is detached here; the caller passes log-probs that are.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rewards.advantages import leave_one_out

Mask = Bool[Tensor, "B T"] | Bool[Tensor, "B G T"] | None

VR_CLI_STEPS = ((0.05, 0.5), (1.0, 0.9), (2.0, 1.0))
"""(improvement in percent above which, reward): VR-CLI's, arXiv 2503.22828."""


def target_logp(
    target_logps: Float[Tensor, "B G T"], mask: Mask = None, *, mean: bool = False
) -> Float[Tensor, "B G"]:
    """Return log p(target | context, thought) in nats: the sum over the target's tokens, or their mean.

    The one likelihood reward that neither vanishes on long targets nor needs a scale (arXiv 2602.03979).
    Against a baseline that all thoughts of a position share its leave-one-out advantage is RLP's.

    >>> target_logp(torch.tensor([[[-1.0, -3.0]]]), mean=True)
    tensor([[-2.]], dtype=torch.float64)
    """
    logps, counted = _counted(target_logps, mask)
    size = counted.sum(-1)
    total = torch.where(counted, logps, 0.0).sum(-1)
    return torch.where(size > 0, total / size if mean else total, torch.nan)


def target_probability(
    target_logps: Float[Tensor, "B G T"], mask: Mask = None, *, mean: bool = False
) -> Float[Tensor, "B G"]:
    """Return p(target | context, thought): of the whole target (VeriFree), or the mean of its tokens' (RLPR).

    The product vanishes on long targets; the mean does not, but a few easy tokens dominate it.
    Source: VeriFree, arXiv 2505.21493; RLPR, arXiv 2506.18254.

    >>> target_probability(torch.tensor([[[0.5, 0.25]]]).log())
    tensor([[0.1250]], dtype=torch.float64)
    """
    if not mean:
        return target_logp(target_logps, mask).exp()
    logps, counted = _counted(target_logps, mask)
    size = counted.sum(-1)
    return torch.where(size > 0, torch.where(counted, logps.exp(), 0.0).sum(-1) / size, torch.nan)


def debiased_probability(
    target_logps: Float[Tensor, "B G T"], baseline_logps: Float[Tensor, "B T"], mask: Mask = None
) -> Float[Tensor, "B G"]:
    """Return the mean token probability with the thought less that without it, clipped to [0, 1]: RLPR's
    reward.

    Clipped at 0, all thoughts that harm are alike: a position without a helpful thought teaches nothing.
    Source: RLPR, arXiv 2506.18254.

    >>> debiased_probability(torch.tensor([[[0.5], [0.1]]]).log(), torch.tensor([[0.2]]).log())
    tensor([[0.3000, 0.0000]], dtype=torch.float64)
    """
    plain = baseline_logps.unsqueeze(1).expand_as(target_logps)
    gain = target_probability(target_logps, mask, mean=True) - target_probability(plain, mask, mean=True)
    return gain.clamp(0, 1)


def perplexity_gain(
    target_logps: Float[Tensor, "B G T"],
    baseline_logps: Float[Tensor, "B T"],
    mask: Mask = None,
    *,
    steps: Sequence[tuple[float, float]] | None = None,
) -> Float[Tensor, "B G"]:
    """Return by how many percent the thought lowers the target's perplexity: 100 · (1 − PPL with / PPL
    without).

    `steps` makes it a step function: the reward of the highest threshold that the percentage exceeds, else 0.
    Source: VR-CLI, arXiv 2503.22828 (with `VR_CLI_STEPS`).

    >>> perplexity_gain(torch.tensor([[[-1.0], [-1.1]]]), torch.tensor([[-1.1]])).round(decimals=4)
    tensor([[9.5163, 0.0000]], dtype=torch.float64)
    """
    plain = baseline_logps.unsqueeze(1).expand_as(target_logps)
    ratio = (target_logp(plain, mask, mean=True) - target_logp(target_logps, mask, mean=True)).exp()
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
    """Return (advantages, weights of the direct term) of JEPO's bound log mean exp over `samples` thoughts;
    None: all G.

    `logps` are log p(target | context, thought); NaN: not applicable. The G thoughts are taken in turns of
    `samples`, each with a bound L of its own, tighter the more thoughts it has. With m valid thoughts in a
    turn,

        advantage of thought i = m · (L − L without i),    weight of log p of thought i = m · softmax(logps)
        at i,

    so that means over thoughts of advantage · Σ log π(token) + weight · log p have, on-policy, the gradient
    of the mean bound as their expected gradient. The sum is over a thought's tokens (`loss.reduction: sum`);
    with their mean it is not. With one sample there is no bound without it: the baseline is the mean of the
    other thoughts, so the advantage is that of `leave_one_out(logps)`, and the weight 1.

    Raises:
        ValueError: `samples` below 1, or G no multiple of it; G < 2 with one sample.

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
    here = valid.unflatten(1, (-1, size))
    count = here.sum(-1, keepdim=True).double()
    filled = torch.where(here, turns, -torch.inf)
    bound = filled.logsumexp(-1, keepdim=True) - count.clamp(min=1).log()
    others = torch.where(
        torch.eye(size, dtype=torch.bool, device=logps.device), -torch.inf, filled.unsqueeze(-2)
    )
    without = others.logsumexp(-1) - (count - 1).clamp(min=1).log()
    apart = torch.where(bound == without, 0.0, bound - without)  # both -inf: nothing to tell them by
    advantage = torch.where(here & (count > 1), count * apart, 0.0)
    weight = (count * (filled - filled.logsumexp(-1, keepdim=True)).exp()).nan_to_num(0.0)
    return advantage.flatten(1).to(logps.dtype), weight.flatten(1).to(logps.dtype)


def _counted(logps: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """(float64 log-probs, which of them count), both [B, G, T]."""
    if logps.ndim != 3:
        raise ValueError(f"target_logps {tuple(logps.shape)} must be [B, G, T]")
    if mask is None:
        return logps.double(), torch.ones_like(logps, dtype=torch.bool)
    mask = mask.unsqueeze(1) if mask.ndim == 2 else mask
    if mask.shape[::2] != logps.shape[::2] or mask.shape[1] not in (1, logps.shape[1]):
        raise ValueError(f"mask {tuple(mask.shape)} must be [B, T] or [B, G, T] for {tuple(logps.shape)}")
    return logps.double(), mask.expand_as(logps)
