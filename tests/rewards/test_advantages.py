"""Advantages: the paper's example, leave-one-out, exact zeros, and a baseline that leaves no bit behind."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rewards import (
    batch_normalized,
    group_normalized,
    information_gain,
    leave_one_out,
    max_rl,
    zero_variance_fraction,
)

NORMALIZERS = (leave_one_out, group_normalized, batch_normalized)
NAN = math.nan


def logps(low: float = -100.0) -> st.SearchStrategy[float]:
    """What an fp32 log-softmax returns: 0, or between 2⁻²³ and 128 nats in size."""
    return st.floats(low, 0, width=32).filter(lambda x: x == 0 or abs(x) >= 2**-23)


def groups(least: int = 2, most: int = 8) -> st.SearchStrategy[list[float]]:
    return st.lists(logps(), min_size=least, max_size=most)


def test_golden_values_of_the_paper() -> None:
    """Pitfall 5 and METHODS §1.2; a group of nothing but negative rewards still learns (pitfall 24)."""
    advantage = leave_one_out(torch.tensor([[-0.8, -0.6, -0.5, -0.3]]))
    assert advantage[0].tolist() == pytest.approx([-1 / 3, -1 / 15, 1 / 15, 1 / 3], abs=1e-6)
    assert [round(x, 3) for x in advantage[0].tolist()] == [-0.333, -0.067, 0.067, 0.333]


@settings(max_examples=100, deadline=None)
@given(groups())
def test_equals_leave_one_out_and_the_scaled_difference_from_the_mean(rewards: list[float]) -> None:
    """Pitfall 5: G/(G−1) · (r − mean) is each reward minus the mean of the others."""
    values, size = torch.tensor([rewards], dtype=torch.float64), len(rewards)
    advantage = leave_one_out(values)
    torch.testing.assert_close(
        advantage, size / (size - 1) * (values - values.mean()), atol=1e-11, rtol=1e-12
    )
    others = [reward - (sum(rewards) - reward) / (size - 1) for reward in rewards]
    assert advantage[0].tolist() == pytest.approx(others, abs=1e-10)
    assert advantage.sum().item() == pytest.approx(0, abs=1e-10)


@settings(max_examples=100, deadline=None)
@given(groups(), logps(-127.0))
def test_a_baseline_shared_by_the_group_leaves_no_bit_behind(rewards: list[float], baseline: float) -> None:
    """Pitfall 4, invariant 2: with the baseline and without it, the advantages agree in every bit of
    float64.
    """
    targets = torch.tensor(rewards).view(1, -1, 1)
    with_it = leave_one_out(information_gain(targets, torch.tensor([[baseline]])))
    without = leave_one_out(information_gain(targets, torch.zeros(1, 1)))
    assert with_it.dtype == torch.float64 and torch.equal(with_it, without)
    assert torch.equal(with_it.float(), without.float())


def test_a_baseline_leaves_no_bit_behind_on_sums_of_real_log_softmax_values() -> None:
    """Pitfall 4 over horizons: [256 positions, 8 thoughts, 16 target tokens] as a model would produce
    them.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = (torch.randn(256, 8, 16, 50, generator=generator) * 4).log_softmax(-1)[..., 0]
    plain = (torch.randn(256, 16, 50, generator=generator) * 4).log_softmax(-1)[..., 0]
    mask = torch.rand(256, 16, generator=generator) < 0.8
    none = torch.zeros_like(plain)
    assert torch.equal(
        leave_one_out(information_gain(tokens, plain, mask)),
        leave_one_out(information_gain(tokens, none, mask)),
    )
    for options in ({"discount": 0.9}, {"reduction": "mean"}):  # these round: what is left is far below fp32
        gap = (
            (
                leave_one_out(information_gain(tokens, plain, mask, **options))
                - leave_one_out(information_gain(tokens, none, mask, **options))
            )
            .abs()
            .max()
        )
        assert gap < 1e-12


@settings(max_examples=100, deadline=None)
@given(
    st.floats(-1e6, 1e6, width=32),
    st.integers(2, 64),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_equal_rewards_give_exactly_zero(reward: float, size: int, dtype: torch.dtype) -> None:
    """Pitfall 6: not a rounding error, which a division by the deviation would blow up to 1."""
    rewards = torch.full((3, size), reward, dtype=dtype)
    assert not leave_one_out(rewards).any() and not group_normalized(rewards).any()
    assert zero_variance_fraction(rewards) == 1.0


@settings(max_examples=50, deadline=None)
@given(st.permutations(list(range(6))), groups(6, 6))
def test_permuting_a_group_permutes_its_advantages(order: list[int], rewards: list[float]) -> None:
    values = torch.tensor([rewards], dtype=torch.float64)
    for normalize in NORMALIZERS:
        torch.testing.assert_close(
            normalize(values[:, order]), normalize(values)[:, order], atol=1e-9, rtol=1e-9
        )


def test_not_applicable_rewards_take_no_part() -> None:
    rewards = torch.tensor([[NAN, 1.0, 3.0, NAN], [NAN, NAN, 5.0, NAN], [NAN] * 4, [0.0, 0.0, 0.0, 4.0]])
    advantage = leave_one_out(rewards)
    assert advantage.tolist() == [
        [0, -2, 2, 0],
        [0, 0, 0, 0],
        [0, 0, 0, 0],
        pytest.approx([-4 / 3] * 3 + [4]),
    ]
    assert torch.equal(leave_one_out(rewards[:1, 1:3]), advantage[:1, 1:3])
    assert group_normalized(rewards, eps=0.0)[0].tolist() == pytest.approx([0, -(2**-0.5), 2**-0.5, 0])
    for normalize in NORMALIZERS:
        assert normalize(rewards).isfinite().all() and not normalize(rewards)[1:3].any()
    assert zero_variance_fraction(rewards) == 0.0
    assert math.isnan(zero_variance_fraction(rewards[1:3]))


def test_an_infinite_reward_spoils_its_group_visibly() -> None:
    rewards = torch.tensor([[1.0, -math.inf, 2.0], [1.0, 2.0, 3.0]])
    for normalize in (leave_one_out, group_normalized):
        advantage = normalize(rewards)
        assert advantage[0].isnan().all() and advantage[1].isfinite().all()
    assert batch_normalized(rewards)[0].isnan().all()


def test_group_normalized_is_the_mean_and_the_sample_deviation() -> None:
    rewards = torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.5, 1.0]], dtype=torch.float64)
    expected = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    torch.testing.assert_close(group_normalized(rewards), expected)
    torch.testing.assert_close(group_normalized(rewards + 50), expected)


def test_rounding_noise_is_not_amplified_to_unit_advantage() -> None:
    """Pitfall 7: gains that differ by bf16 noise only. Without the floor they become advantages of size 1."""
    noise = torch.tensor([[2.0, 2.0, 2.015625, 2.0]])
    assert group_normalized(noise, floor=0.0).abs().max() > 1
    assert not group_normalized(noise, floor=0.05).any()
    assert leave_one_out(noise).abs().max() < 0.02


def test_batch_normalized_keeps_the_groups_relative_weight_and_feels_the_baseline() -> None:
    rewards = torch.tensor([[0.0, 1.0], [0.0, 10.0]], dtype=torch.float64)
    advantage = batch_normalized(rewards, eps=0.0)
    torch.testing.assert_close(advantage, (rewards - rewards.mean(1, keepdim=True)) / rewards.std())
    assert advantage[1, 1] == pytest.approx(10 * advantage[0, 1].item())
    moved = batch_normalized(rewards + torch.tensor([[0.0], [50.0]], dtype=torch.float64), eps=0.0)
    assert not torch.allclose(moved, advantage)  # invariant 2 says where a baseline matters: here
    assert not batch_normalized(torch.ones(2, 2)).any()


@pytest.mark.parametrize("normalize", NORMALIZERS)
def test_a_single_thought_is_refused(normalize) -> None:
    """Pitfall 5: G = 1 has nobody to leave out for."""
    with pytest.raises(ValueError, match=r"\(4, 1\).*sampling.thoughts"):
        normalize(torch.zeros(4, 1))


def test_settings_that_would_divide_by_zero_are_refused() -> None:
    for options in ({"eps": 0.0, "floor": 0.0}, {"eps": -1.0}, {"floor": -1.0}):
        with pytest.raises(ValueError, match="eps"):
            group_normalized(torch.zeros(1, 2), **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_types_and_empty_batches(dtype: torch.dtype) -> None:
    for normalize in NORMALIZERS:
        assert normalize(torch.zeros(0, 4, dtype=dtype)).shape == (0, 4)
        assert normalize(torch.tensor([[1.0, 2.0]], dtype=dtype)).dtype == dtype


def test_zero_variance_fraction() -> None:
    rewards: Tensor = torch.tensor([[1.0, 1.0, NAN], [1.0, 2.0, 3.0], [NAN, 2.0, 2.0], [NAN, NAN, 1.0]])
    assert zero_variance_fraction(rewards) == pytest.approx(2 / 3)


@pytest.mark.parametrize("size", [2, 3, 4, 6])
@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_max_rl_follows_the_logarithm_up_to_the_order_of_the_group(p: float, size: int) -> None:
    """The expected gradient over all outcomes of G thoughts, against that of -sum of (1 - p)^k / k, k < G.

    A thought is right with probability p, so its score d log prob / dp is 1/p or -1/(1 - p). The plain
    advantage gives 1, the gradient of p.
    """
    expected = {max_rl: sum((1 - p) ** (k - 1) for k in range(1, size)), leave_one_out: 1.0}
    for form, gradient in expected.items():
        found = 0.0
        for outcome in itertools.product((0.0, 1.0), repeat=size):
            chance = math.prod(p if right else 1 - p for right in outcome)
            advantage = form(torch.tensor([outcome], dtype=torch.float64))[0].tolist()
            scores = [1 / p if right else -1 / (1 - p) for right in outcome]
            found += chance * sum(a * s for a, s in zip(advantage, scores, strict=True)) / size
        assert found == pytest.approx(gradient)


def test_max_rl_edges() -> None:
    """No right thought, equal rewards, and groups with fewer than two rewards give exactly 0."""
    rows = [[0.0, 0.0, 0.0], [0.3, 0.3, 0.3], [NAN, 0.7, NAN], [NAN, NAN, NAN]]
    assert (max_rl(torch.tensor(rows)) == 0).all()
    found = max_rl(torch.tensor([[1.0, NAN, 0.0], [0.9, 0.3, 0.0]]))
    assert found[0].tolist() == [1, 0, -1] and found[1].tolist() == pytest.approx([1.25, -0.25, -1.0])
    assert max_rl(torch.tensor([[math.inf, 1.0, 0.0]])).isnan().all()
    with pytest.raises(ValueError, match="no reward may be negative; the lowest is -0.5"):
        max_rl(torch.tensor([[1.0, -0.5, 0.0]]))
    with pytest.raises(ValueError, match="at least two thoughts"):
        max_rl(torch.tensor([[1.0]]))
