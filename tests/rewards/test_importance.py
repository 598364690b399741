"""Importance ratios: exactly 1 on policy, truncation, and numbers that say what was truncated."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards import importance_ratio


@settings(deadline=None)
@given(st.lists(st.floats(-100, 0, width=32), min_size=1, max_size=8))
def test_exactly_one_on_policy_and_differentiable(values: list[float]) -> None:
    """Pitfall 8: on the first inner step the ratio is 1 in every bit, and its gradient is that of the
    log-prob.
    """
    now = torch.tensor(values, requires_grad=True)
    ratio = importance_ratio(now, now.detach(), cap=2.0)
    assert ratio.raw.tolist() == ratio.truncated.tolist() == [1.0] * len(values)
    assert ratio.diagnostics["raw_ess"] == 1.0 and ratio.diagnostics["truncated_fraction"] == 0.0
    (gradient,) = torch.autograd.grad(ratio.raw.sum(), now)
    assert gradient.tolist() == [1.0] * len(values)


def test_truncation_and_the_diagnostics_before_and_after() -> None:
    """Pitfall 8: weights 1/2, 1, 4 under a cap of 2, by hand; the fourth token does not count."""
    now = torch.log(torch.tensor([[0.5, 1.0, 4.0, 100.0]]))
    ratio = importance_ratio(now, torch.zeros(1, 4), torch.tensor([[True, True, True, False]]), cap=2.0)
    assert ratio.raw[0].tolist() == pytest.approx([0.5, 1.0, 4.0, 0.0])
    assert ratio.truncated[0].tolist() == pytest.approx([0.5, 1.0, 2.0, 0.0])
    expected = {
        "raw_mean": 5.5 / 3,
        "raw_min": 0.5,
        "raw_max": 4.0,
        "raw_ess": 5.5**2 / (3 * 17.25),
        "truncated_mean": 3.5 / 3,
        "truncated_min": 0.5,
        "truncated_max": 2.0,
        "truncated_ess": 3.5**2 / (3 * 5.25),
        "truncated_fraction": 1 / 3,
        "abs_log_ratio_mean": math.log(8) / 3,
        "abs_log_ratio_max": math.log(4),
        "tokens": 3.0,
        "nonfinite": 0.0,
    }
    assert ratio.diagnostics == pytest.approx(expected, abs=1e-6)


def test_without_a_cap_nothing_is_truncated() -> None:
    ratio = importance_ratio(torch.tensor([3.0]), torch.tensor([0.0]))
    assert torch.equal(ratio.raw, ratio.truncated) and ratio.diagnostics["truncated_fraction"] == 0.0


def test_truncated_tokens_have_no_gradient() -> None:
    now = torch.tensor([0.0, 5.0, 1000.0], requires_grad=True)
    importance_ratio(now, torch.zeros(3), cap=2.0).truncated.sum().backward()
    assert now.grad is not None and now.grad.tolist() == [1.0, 0.0, 0.0]


def test_uncounted_tokens_may_hold_anything() -> None:
    now = torch.tensor([math.nan, -1.0], requires_grad=True)
    ratio = importance_ratio(now, torch.tensor([-math.inf, -1.0]), torch.tensor([False, True]))
    assert ratio.raw.tolist() == [0.0, 1.0] and ratio.diagnostics["nonfinite"] == 0.0
    ratio.raw.sum().backward()
    assert now.grad is not None and now.grad.tolist() == [0.0, 1.0]


def test_nan_is_kept_and_counted_and_nothing_overflows() -> None:
    now = torch.tensor([math.nan, 0.0, 0.0, -math.inf])
    ratio = importance_ratio(now, torch.tensor([0.0, -1000.0, 0.0, 0.0]), cap=2.0)
    assert ratio.raw[0].isnan() and ratio.truncated[0].isnan()
    assert ratio.raw[1:].isfinite().all() and ratio.truncated[1:].tolist() == pytest.approx([2.0, 1.0, 0.0])
    assert ratio.diagnostics["nonfinite"] == 1 and ratio.diagnostics["tokens"] == 4
    assert ratio.diagnostics["raw_max"] == pytest.approx(math.exp(80), rel=1e-5)
    assert ratio.diagnostics["raw_ess"] == pytest.approx(1 / 3)


def test_no_tokens_and_types() -> None:
    ratio = importance_ratio(torch.zeros(0), torch.zeros(0), cap=2.0)
    assert (
        ratio.raw.shape == (0,)
        and ratio.diagnostics["tokens"] == 0
        and math.isnan(ratio.diagnostics["raw_mean"])
    )
    assert importance_ratio(torch.zeros(2).bfloat16(), torch.zeros(2)).raw.dtype == torch.float32


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"one shape.*\(2,\), \(3,\)"):
        importance_ratio(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match="mask|shape"):
        importance_ratio(torch.zeros(2), torch.zeros(2), torch.ones(1, dtype=torch.bool))
    with pytest.raises(ValueError, match="cap 0.0"):
        importance_ratio(torch.zeros(2), torch.zeros(2), cap=0.0)
