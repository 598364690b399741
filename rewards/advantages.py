"""Advantages of a group of thoughts, computed from their rewards.

Shapes: B positions, G thoughts per position. Everything is computed in float64 and cast to the rewards' dtype
last.

A NaN reward means *not applicable*: it is left out of every mean and deviation, and its advantage is 0. An
infinite reward makes its whole group (or batch) NaN, so that the step is visibly broken. To bound the gain,
use `information_gain(..., clip=…)`.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def leave_one_out(rewards: Float[Tensor, "B G"]) -> Float[Tensor, "B G"]:
    """Return each reward minus the mean of the *other* rewards of its group: G/(G−1) · (r − mean).

    With n valid rewards, n takes the place of G. The mean of the others does not depend on the thought
    itself, so this baseline adds no bias to a policy gradient that sums the log-probs of a thought's tokens
    (`loss.reduction: sum`). RLP takes the mean over tokens instead. That weights the tokens of a long thought
    less, and is not an unbiased gradient of the expected reward. Nothing is divided by the deviation. The
    advantages of a group sum to 0. A group whose rewards are all negative still learns: its least harmful
    thought is preferred. A group with fewer than two valid rewards gets all zeros.

    Exactness: the group's first valid reward is subtracted before anything else. Equal rewards give exactly
    0. A constant added to a whole group (a baseline) changes no bit if that addition was exact in float64;
    otherwise the change is about 1e-16 of the constant.

    Raises:
        ValueError: G < 2, where there are no other rewards.

    Source: RLP, arXiv 2510.01265, eq. 7; the same as RLOO, arXiv 2402.14740.

    >>> leave_one_out(torch.tensor([[-0.8, -0.6, -0.5, -0.3]]))
    tensor([[-0.3333, -0.0667,  0.0667,  0.3333]])
    """
    group = _offsets(rewards)
    total = group.values.sum(1, keepdim=True)
    advantage = (group.count * group.values - total) / (group.count - 1).clamp(min=1)
    return torch.where(group.comparable, advantage, 0.0).to(rewards.dtype)


def group_normalized(
    rewards: Float[Tensor, "B G"], *, eps: float = 1e-4, floor: float = 1e-3
) -> Float[Tensor, "B G"]:
    """Return (r − group mean) / (group deviation + eps), and 0 for groups whose deviation is below `floor`.

    The deviation is the sample deviation (divided by n − 1, as in TRL). Dividing by it gives every group the
    same weight, however little its thoughts differ. Without `floor`, in units of the reward, differences that
    are rounding noise would become advantages of size 1 (fp32 log-probs: 1e-3; bf16 log-probs: about 0.05).
    Both defaults are ours. Adding a constant to a group changes nothing. Scaling a group changes nothing
    either, up to eps and as long as its deviation stays above the floor.

    Raises:
        ValueError: G < 2; eps or floor below 0, or both 0.

    Source: GRPO, arXiv 2402.03300, §4.1.2 (no floor there); why not to divide: Dr. GRPO, arXiv 2503.20783.

    >>> group_normalized(torch.tensor([[1.0, 3.0], [2.0, 2.0001]]), eps=0.0)
    tensor([[-0.7071,  0.7071],
            [ 0.0000,  0.0000]])
    """
    _check_eps(eps, floor)
    group = _centred(rewards)
    squares = group.values.square().sum(1, keepdim=True)
    deviation = (squares / (group.count - 1).clamp(min=1)).sqrt()
    return _divide(group, deviation, eps, floor).to(rewards.dtype)


def batch_normalized(
    rewards: Float[Tensor, "B G"], *, eps: float = 1e-4, floor: float = 1e-3
) -> Float[Tensor, "B G"]:
    """Return (r − group mean) / (deviation over the whole batch + eps): groups keep their relative weight.

    The deviation is the sample deviation of all valid rewards of the tensor, before group means are
    subtracted. So a constant added to one group matters here, unlike in the two functions above, and the
    choice of baseline matters too. Pass the whole batch, not a micro-batch. If the deviation is below
    `floor`, all advantages are 0. A group with fewer than two valid rewards gets zeros.

    Raises:
        ValueError: G < 2; eps or floor below 0, or both 0.

    Source: arXiv 2508.08221 (mean of the group, deviation of the batch); TRL's `scale_rewards="batch"`.

    >>> batch_normalized(torch.tensor([[0.0, 2.0], [4.0, 6.0]]), eps=0.0)
    tensor([[-0.3873,  0.3873],
            [-0.3873,  0.3873]])
    """
    _check_eps(eps, floor)
    group = _centred(rewards)
    if rewards.numel() == 0:
        return rewards.clone()
    batch = _centred(rewards.reshape(1, -1))
    deviation = (batch.values.square().sum() / (batch.count - 1).clamp(min=1)).sqrt()
    return _divide(group, deviation, eps, floor).to(rewards.dtype)


def max_rl(rewards: Float[Tensor, "B G"]) -> Float[Tensor, "B G"]:
    """Return (r − group mean) / group mean, and exactly 0 for a group whose mean is 0.

    A right thought weighs more, the rarer it is in its group. With rewards of 0 and 1, let p be the
    probability of being right. The plain advantage follows the gradient of p; this one follows that of
    log p = −Σ (1 − p)^k / k, cut off after k = G − 1 (a group without a right thought would be needed for
    k = G, and gives 0 here). Equal rewards give exactly 0. NaN rewards take no part, and a group with fewer
    than two valid rewards gets all zeros.

    Raises:
        ValueError: G < 2, or a negative reward, since a mean below 0 would turn the sign.

    Source: MaxRL, arXiv 2602.02710.

    >>> max_rl(torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]))
    tensor([[ 3., -1., -1., -1.],
            [ 0.,  0.,  0.,  0.]])
    """
    if bool((rewards < 0).any()):
        raise ValueError(
            f"max_rl divides by the mean reward of a group, so no reward may be negative; the lowest is "
            f"{float(rewards[rewards < 0].min()):.3g}"
        )
    group = _centred(rewards)
    total = torch.where(group.valid, rewards.double(), 0.0).sum(1, keepdim=True)
    mean = total / group.count.clamp(min=1)
    counted = group.comparable & (mean != 0)
    return torch.where(counted, group.values / mean, 0.0).to(rewards.dtype)


def zero_variance_fraction(rewards: Float[Tensor, "B G"]) -> float:
    """Return the share of groups whose valid rewards are all equal, so that nothing can be learned from them.

    Only groups with at least two valid rewards count; NaN if there are none. Expect the share to rise as
    training succeeds.

    >>> zero_variance_fraction(torch.tensor([[1.0, 1.0], [0.0, 1.0]]))
    0.5
    """
    group = _offsets(rewards)
    usable = (group.count > 1).squeeze(1)
    equal = (torch.where(group.valid, group.values, 0.0) == 0).all(1) & usable
    return float(equal.sum() / usable.sum())


@dataclass(frozen=True, slots=True)
class _GroupRewards:
    """Rewards of groups in float64, each group shifted by a constant of its own."""

    values: Float[Tensor, "B G"]
    """0 where the reward is not valid."""
    valid: Bool[Tensor, "B G"]
    count: Float[Tensor, "B 1"]
    """Valid rewards of the group."""

    @property
    def comparable(self) -> Bool[Tensor, "B G"]:
        """Which rewards are valid and have another valid reward in their group."""
        return self.valid & (self.count > 1)


def _offsets(rewards: Tensor) -> _GroupRewards:
    """Return rewards minus the first valid one of their group; NaN for a group with an infinite reward."""
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(
            f"rewards {tuple(rewards.shape)} must be [B, G] with at least two thoughts per position: a lone "
            "thought cannot be compared with others. Raise `sampling.thoughts` to 2 or more"
        )
    values = rewards.double()
    valid = ~rewards.isnan()
    first = valid.to(torch.int8).argmax(1, keepdim=True)
    offsets = torch.where(valid, values - values.gather(1, first), 0.0)
    has_infinite = values.isinf().any(1, keepdim=True)
    offsets = torch.where(has_infinite, torch.nan, offsets)
    return _GroupRewards(offsets, valid, valid.sum(1, keepdim=True).double())


def _centred(rewards: Tensor) -> _GroupRewards:
    """Return the rewards minus the mean of their group."""
    group = _offsets(rewards)
    mean = group.values.sum(1, keepdim=True) / group.count.clamp(min=1)
    return replace(group, values=torch.where(group.valid, group.values - mean, 0.0))


def _divide(group: _GroupRewards, deviation: Tensor, eps: float, floor: float) -> Tensor:
    counted = group.comparable & ~(deviation < floor)
    return torch.where(counted, group.values / (deviation + eps), 0.0)


def _check_eps(eps: float, floor: float) -> None:
    if eps < 0 or floor < 0 or eps + floor == 0:
        raise ValueError(
            f"eps {eps} and floor {floor} must not be negative, and not both 0: equal rewards divide by 0"
        )
