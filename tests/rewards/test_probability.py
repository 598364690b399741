"""Likelihood rewards: hand-worked values, the bound against its definition, and how they reduce to each
other.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rewards import (
    VR_CLI_STEPS,
    debiased_probability,
    information_gain,
    leave_one_out,
    multi_sample_bound,
    perplexity_gain,
    target_logp,
    target_probability,
)

NAN = math.nan


def of(*probabilities: list[float]) -> Tensor:
    """Log-probs [1, G, T] of token probabilities, one list a thought."""
    return torch.tensor([probabilities], dtype=torch.float64).log()


def test_hand_worked_values() -> None:
    thoughts, plain = of([0.5, 0.25], [0.1, 0.9]), torch.tensor([[0.2, 0.2]], dtype=torch.float64).log()
    assert target_logp(thoughts)[0].exp().tolist() == pytest.approx([0.125, 0.09])
    assert target_logp(thoughts, mean=True)[0].exp().tolist() == pytest.approx([0.125**0.5, 0.3])
    assert target_probability(thoughts)[0].tolist() == pytest.approx([0.125, 0.09])
    assert target_probability(thoughts, mean=True)[0].tolist() == pytest.approx([0.375, 0.5])
    assert debiased_probability(thoughts, plain)[0].tolist() == pytest.approx([0.175, 0.3])
    assert debiased_probability(of([0.1, 0.1]), plain).item() == 0  # harm is clipped
    gain = perplexity_gain(thoughts, plain)[0].tolist()  # PPL without: 5; with: 1 / sqrt(.125), 1 / .3
    assert gain == pytest.approx([100 * (1 - 0.125**-0.5 / 5), 100 * (1 - 1 / 0.3 / 5)])


def test_vr_clis_steps_begin_above_their_thresholds() -> None:
    plain = torch.zeros(1, 1, dtype=torch.float64)
    percents = [-1.0, 0.0, 0.04, 0.06, 0.9, 1.1, 1.9, 2.1]
    thoughts = torch.tensor([[[-math.log(1 - p / 100)] for p in percents]], dtype=torch.float64)
    assert perplexity_gain(thoughts, plain)[0].tolist() == pytest.approx(percents, abs=1e-12)
    assert perplexity_gain(thoughts, plain, steps=VR_CLI_STEPS)[0].tolist() == [
        0,
        0,
        0,
        0.5,
        0.5,
        0.9,
        0.9,
        1,
    ]


def test_what_is_masked_may_hold_anything_and_no_token_is_not_applicable() -> None:
    thoughts = of([0.5, NAN], [0.25, 7.0])
    plain, mask = torch.tensor([[-1.0, NAN]]).double(), torch.tensor([[True, False]])
    assert target_logp(thoughts, mask)[0].exp().tolist() == pytest.approx([0.5, 0.25])
    assert target_probability(thoughts, mask, mean=True)[0].tolist() == pytest.approx([0.5, 0.25])
    assert debiased_probability(thoughts, plain, mask)[0].tolist() == pytest.approx([0.5 - math.exp(-1), 0])
    assert not perplexity_gain(thoughts, plain, mask).isnan().any()
    none = torch.zeros(1, 2, dtype=torch.bool)
    for value in (
        target_logp(thoughts, none),
        target_logp(thoughts, none, mean=True),
        target_probability(thoughts, none),
        target_probability(thoughts, none, mean=True),
        debiased_probability(thoughts, plain, none),
        perplexity_gain(thoughts, plain, none),
        perplexity_gain(thoughts, plain, none, steps=VR_CLI_STEPS),
    ):
        assert value.isnan().all()


def test_log_prob_is_the_information_gain_up_to_what_a_position_shares() -> None:
    generator = torch.Generator().manual_seed(0)
    thoughts, plain = (
        -torch.rand(3, 5, 4, generator=generator) * 9,
        -torch.rand(3, 4, generator=generator) * 9,
    )
    gain = leave_one_out(information_gain(thoughts, plain))
    torch.testing.assert_close(leave_one_out(target_logp(thoughts)), gain, rtol=0, atol=1e-12)


# JEPO


def bound(logps: list[float]) -> float:
    """log mean exp, by its definition."""
    kept = [x for x in logps if x == x]
    return math.log(sum(math.exp(x) for x in kept) / len(kept))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(-30, 0) | st.just(NAN), min_size=2, max_size=6), st.integers(1, 3))
def test_the_bound_is_what_it_says(turn: list[float], turns: int) -> None:
    advantage, weight = multi_sample_bound(
        torch.tensor([turn * turns], dtype=torch.float64), samples=len(turn)
    )
    valid = [i for i, x in enumerate(turn) if x == x]
    for i in range(len(turn)):
        for k in range(turns):  # the same thoughts in each turn: the same numbers
            ours, share = float(advantage[0, k * len(turn) + i]), float(weight[0, k * len(turn) + i])
            if i not in valid:
                assert ours == 0 and share == 0
                continue
            others = [turn[j] for j in valid if j != i]
            theirs = len(valid) * (bound(turn) - bound(others)) if others else 0.0
            assert ours == pytest.approx(theirs, abs=1e-9)
            assert share == pytest.approx(
                len(valid) * math.exp(turn[i]) / sum(math.exp(turn[j]) for j in valid), rel=1e-9
            )


def test_the_bounds_gradient_by_enumeration() -> None:
    """Two thoughts to choose from, p = softmax(t): the estimator's mean over all pairs is the derivative
    of E[L].
    """
    logps = torch.tensor([-0.3, -2.0], dtype=torch.float64)
    t = torch.tensor([0.2, -0.4], dtype=torch.float64, requires_grad=True)
    p = t.softmax(0)
    pairs = [(i, j) for i in (0, 1) for j in (0, 1)]
    expected = sum(p[i] * p[j] * (0.5 * (logps[i].exp() + logps[j].exp())).log() for i, j in pairs)
    (wanted,) = torch.autograd.grad(expected, t, retain_graph=True)
    got = torch.zeros(2, dtype=torch.float64)
    for pair in pairs:
        advantage, _ = multi_sample_bound(logps[list(pair)][None])
        (score,) = torch.autograd.grad((advantage[0] * t.log_softmax(0)[list(pair)]).mean(), t)
        got += float(p[pair[0]] * p[pair[1]]) * score
    torch.testing.assert_close(got, wanted)


def test_with_one_sample_it_is_the_log_probability() -> None:
    logps = torch.tensor([[-1.0, -2.0, NAN, -4.0]], dtype=torch.float64)
    advantage, weight = multi_sample_bound(logps, samples=1)
    assert torch.equal(advantage, leave_one_out(logps)) and weight.tolist() == [[1, 1, 0, 1]]


def test_impossible_targets_are_no_nan() -> None:
    dead = torch.full((1, 2), -math.inf, dtype=torch.float64)
    assert [x.tolist() for x in multi_sample_bound(dead)] == [[[0, 0]], [[0, 0]]]
    advantage, weight = multi_sample_bound(torch.tensor([[-math.inf, -1.0]], dtype=torch.float64))
    assert advantage[0, 1] == math.inf and weight.tolist() == [[0, 2]]


def test_errors(unchecked: None) -> None:
    with pytest.raises(ValueError, match="4 thoughts cannot be taken in turns of 3"):
        multi_sample_bound(torch.zeros(1, 4), samples=3)
    with pytest.raises(ValueError, match=r"must be \[B, G, T\]"):
        target_logp(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="mask"):
        target_logp(torch.zeros(1, 2, 3), torch.ones(1, 2, dtype=torch.bool))
