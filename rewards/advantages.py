"""From the rewards of a group of thoughts to their advantages.

Shapes: B positions, G thoughts per position. Everything is formed in float64 and cast to the rewards' dtype
last.

A NaN reward means *not applicable*: it takes no part in any mean or deviation and its advantage is 0. An
infinite reward has no mean: its whole group (batch) becomes NaN, so that a broken step is seen (bound the
gain with `information_gain(..., clip=…)`).
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def leave_one_out(rewards: Float[Tensor, "B G"]) -> Float[Tensor, "B G"]:
    """Return each reward minus the mean of the group's *other* rewards: G/(G−1) · (r − mean), n for G with n
    valid.

    The mean of the others is a baseline that the thought itself cannot move: it adds no bias to a policy
    gradient, which sums the log-probs of a thought's tokens (`loss.reduction: sum`). RLP takes their mean,
    which weighs the tokens of a long thought less: a choice, and no unbiased gradient of the expected reward.
    There is no division by the deviation. Advantages of a group sum to 0. A group whose rewards are all
    negative still learns: its least harmful thought is preferred. A group with fewer than two valid rewards
    gets all zeros.

    Exactness: the group's first valid reward is subtracted before anything else. Equal rewards give exactly
    0, and a constant added to a whole group (a baseline) changes no bit, as long as adding it was exact in
    float64; otherwise the change is of the order of 1e-16 of the constant.

    Raises:
        ValueError: G < 2, which has no others to compare with.

    Source: RLP, arXiv 2510.01265, eq. 7; the same as RLOO, arXiv 2402.14740.

    >>> leave_one_out(torch.tensor([[-0.8, -0.6, -0.5, -0.3]]))
    tensor([[-0.3333, -0.0667,  0.0667,  0.3333]])
    """
    offsets, valid, count = _offsets(rewards)
    total = offsets.sum(1, keepdim=True)
    advantage = (count * offsets - total) / (count - 1).clamp(min=1)
    return torch.where(valid & (count > 1), advantage, 0.0).to(rewards.dtype)


def group_normalized(
    rewards: Float[Tensor, "B G"], *, eps: float = 1e-4, floor: float = 1e-3
) -> Float[Tensor, "B G"]:
    """Return (r − group mean) / (group deviation + eps), and 0 for groups whose deviation is below `floor`.

    The deviation is the sample one (divided by n − 1, as TRL does). Dividing by it gives every group the same
    weight however little its thoughts differ: differences that are rounding noise would become advantages of
    size 1, which is what `floor`, in units of the reward, prevents (fp32 log-probs: 1e-3; bf16 log-probs:
    about 0.05). Both defaults are ours. Adding a constant to a group changes nothing, scaling it (above the
    floor, up to eps) neither.

    Raises:
        ValueError: G < 2; eps or floor below 0, or both 0.

    Source: GRPO, arXiv 2402.03300, §4.1.2 (no floor there); why not to divide: Dr. GRPO, arXiv 2503.20783.

    >>> group_normalized(torch.tensor([[1.0, 3.0], [2.0, 2.0001]]), eps=0.0)
    tensor([[-0.7071,  0.7071],
            [ 0.0000,  0.0000]])
    """
    _check_eps(eps, floor)
    centred, valid, count = _centred(rewards)
    deviation = (centred.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    return _divide(centred, deviation, valid & (count > 1), eps, floor).to(rewards.dtype)


def batch_normalized(
    rewards: Float[Tensor, "B G"], *, eps: float = 1e-4, floor: float = 1e-3
) -> Float[Tensor, "B G"]:
    """Return (r − group mean) / (deviation over the whole batch + eps): groups keep their relative weight.

    The deviation (sample, over all valid rewards of the tensor) is that of the raw rewards: here, unlike in
    the two functions above, what is the same for a whole group does matter, so the choice of baseline does.
    Pass the whole batch, not a micro-batch. All zeros where the deviation is below `floor`; a group with
    fewer than two valid rewards gets zeros.

    Raises:
        ValueError: G < 2; eps or floor below 0, or both 0.

    Source: arXiv 2508.08221 (mean of the group, deviation of the batch); TRL's `scale_rewards="batch"`.

    >>> batch_normalized(torch.tensor([[0.0, 2.0], [4.0, 6.0]]), eps=0.0)
    tensor([[-0.3873,  0.3873],
            [-0.3873,  0.3873]])
    """
    _check_eps(eps, floor)
    centred, valid, count = _centred(rewards)
    if rewards.numel() == 0:
        return rewards.clone()
    everything, _, total = _centred(rewards.reshape(1, -1))
    deviation = (everything.square().sum() / (total - 1).clamp(min=1)).sqrt()
    return _divide(centred, deviation, valid & (count > 1), eps, floor).to(rewards.dtype)


def zero_variance_fraction(rewards: Float[Tensor, "B G"]) -> float:
    """Return the share of groups whose valid rewards are all equal, and from which nothing can be learned.

    Among the groups with at least two valid rewards; NaN if there is none. Expect it to rise as training
    succeeds.

    >>> zero_variance_fraction(torch.tensor([[1.0, 1.0], [0.0, 1.0]]))
    0.5
    """
    offsets, valid, count = _offsets(rewards)
    usable = (count > 1).squeeze(1)
    flat = (torch.where(valid, offsets, 0.0) == 0).all(1) & usable
    return float(flat.sum() / usable.sum())


def _offsets(rewards: Tensor) -> tuple[Float[Tensor, "B G"], Bool[Tensor, "B G"], Float[Tensor, "B 1"]]:
    """Rewards minus the group's first valid one in float64 (0 where invalid), which are valid, and how
    many.
    """
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(
            f"rewards {tuple(rewards.shape)} must be [B, G] with at least two thoughts a position: a lone "
            "thought has nothing to be compared with. Raise `sampling.thoughts` to 2 or more"
        )
    values, valid = rewards.double(), ~rewards.isnan()
    first = valid.to(torch.int8).argmax(1, keepdim=True)
    offsets = torch.where(valid, values - values.gather(1, first), 0.0)
    broken = values.isinf().any(1, keepdim=True)
    return torch.where(broken, torch.nan, offsets), valid, valid.sum(1, keepdim=True).double()


def _centred(rewards: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    offsets, valid, count = _offsets(rewards)
    mean = offsets.sum(1, keepdim=True) / count.clamp(min=1)
    return torch.where(valid, offsets - mean, 0.0), valid, count


def _divide(centred: Tensor, deviation: Tensor, counted: Tensor, eps: float, floor: float) -> Tensor:
    return torch.where(counted & ~(deviation < floor), centred / (deviation + eps), 0.0)


def _check_eps(eps: float, floor: float) -> None:
    if eps < 0 or floor < 0 or eps + floor == 0:
        raise ValueError(
            f"eps {eps} and floor {floor} must not be below 0, nor both 0: equal rewards divide by 0"
        )
