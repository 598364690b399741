"""Information gain: values by hand, horizons, masks, and what is not a number."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards import information_gain

THOUGHTS = torch.tensor([[[-1.0, -2.0, -3.0], [-4.0, -1.0, -0.5]]])  # [1, 2, 3]
PLAIN = torch.tensor([[-2.0, -2.0, -2.0]])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.0, 0.5]),
        ({"reduction": "mean"}, [0.0, 0.5 / 3]),
        ({"discount": 0.5}, [1 + 0 - 0.25, -2 + 0.5 + 0.375]),
        ({"discount": 0.5, "reduction": "mean"}, [0.75 / 1.75, -1.125 / 1.75]),
        ({"discount": 0.0}, [1.0, -2.0]),
        ({"discount": 0.0, "reduction": "mean"}, [1.0, -2.0]),
        ({"clip": 0.75}, [0.75 + 0 - 0.75, -0.75 + 0.75 + 0.75]),
        ({"clip": 0.75, "discount": 0.5}, [0.75 - 0.1875, -0.75 + 0.375 + 0.1875]),
    ],
)
def test_golden_values(options: dict[str, Any], expected: list[float]) -> None:
    """Pitfalls 17 and 18 of METHODS §12: the horizon (sum, mean, γᵏ, γ = 0) and the per-token clip."""
    assert information_gain(THOUGHTS, PLAIN, **options)[0].tolist() == pytest.approx(expected, abs=1e-12)


def test_one_token_is_rlp_whatever_the_horizon_says() -> None:
    """Pitfall 17: H = 1 and γ = 0 are RLP's reward."""
    rlp = THOUGHTS[..., 0].double() - PLAIN[:, :1].double()
    for options in ({}, {"discount": 0.5}, {"discount": 0.0}, {"reduction": "mean"}):
        assert torch.equal(information_gain(THOUGHTS[..., :1], PLAIN[:, :1], **options), rlp)
    assert torch.equal(information_gain(THOUGHTS, PLAIN, discount=0.0), rlp)


def test_result_is_float64_and_carries_no_gradient_of_detached_inputs() -> None:
    assert information_gain(THOUGHTS, PLAIN).dtype == torch.float64
    assert information_gain(THOUGHTS.bfloat16(), PLAIN.bfloat16()).dtype == torch.float64
    assert not information_gain(THOUGHTS, PLAIN).requires_grad


def test_masks_per_position_and_per_thought() -> None:
    """Pitfall 17: a document that ends inside the horizon. The discount counts from the target's first
    token.
    """
    shared = torch.tensor([[True, False, True]])
    assert information_gain(THOUGHTS, PLAIN, shared)[0].tolist() == [0.0, -0.5]
    assert information_gain(THOUGHTS, PLAIN, shared, discount=0.5)[0].tolist() == [1 - 0.25, -2 + 0.375]
    assert information_gain(THOUGHTS, PLAIN, shared, reduction="mean")[0].tolist() == [0.0, -0.25]
    own = torch.tensor([[[True, True, True], [False, False, False]]])
    gain = information_gain(THOUGHTS, PLAIN, own)[0].tolist()
    assert gain[0] == 0.0 and math.isnan(gain[1])


def test_nothing_counted_is_not_applicable() -> None:
    nothing = torch.zeros(1, 3, dtype=torch.bool)
    assert information_gain(THOUGHTS, PLAIN, nothing).isnan().all()
    assert information_gain(THOUGHTS, PLAIN, nothing, reduction="mean").isnan().all()
    assert information_gain(torch.zeros(1, 2, 0), torch.zeros(1, 0)).isnan().all()
    only_later = torch.tensor([[False, True, True]])
    assert information_gain(THOUGHTS, PLAIN, only_later, discount=0.0).isnan().all()


def test_what_is_masked_may_hold_anything() -> None:
    spoilt, plain = THOUGHTS.clone(), PLAIN.clone()
    spoilt[..., 1], plain[:, 1] = torch.nan, -torch.inf
    mask = torch.tensor([[True, False, True]])
    assert torch.equal(information_gain(spoilt, plain, mask), information_gain(THOUGHTS, PLAIN, mask))
    spoilt.requires_grad_()
    information_gain(spoilt, plain, mask).sum().backward()
    assert spoilt.grad is not None and spoilt.grad[0, 0].tolist() == [1.0, 0.0, 1.0]


def test_impossible_targets() -> None:
    """Pitfall 18: −inf in both arms says nothing, in one arm it is unbounded, and the clip bounds it."""
    inf = math.inf
    thoughts = torch.tensor([[[-inf], [-1.0], [math.nan]]])
    assert information_gain(thoughts, torch.tensor([[-inf]]))[0].tolist()[:2] == [0.0, inf]
    assert information_gain(thoughts, torch.tensor([[-1.0]]))[0].tolist()[:2] == [-inf, 0.0]
    assert information_gain(thoughts, torch.tensor([[-1.0]]), clip=3.0)[0].tolist()[:2] == [-3.0, 0.0]
    assert information_gain(thoughts, torch.tensor([[-1.0]]), clip=3.0)[0, 2].isnan()


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(-100, 0, width=32), min_size=1, max_size=6),
    st.floats(0, 1),
    st.sampled_from(["sum", "mean"]),
)
def test_a_thought_the_model_ignores_gains_exactly_nothing(
    plain: list[float], discount: float, reduction: str
) -> None:
    baseline = torch.tensor([plain])
    gain = information_gain(
        baseline.unsqueeze(1).repeat(1, 3, 1), baseline, discount=discount, reduction=reduction
    )
    assert gain.tolist() == [[0.0, 0.0, 0.0]]


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((THOUGHTS, PLAIN[:, :2]), {}, r"\(1, 2, 3\).*\(1, 2\)"),
        ((THOUGHTS[0], PLAIN), {}, r"\[B, G, T\]"),
        ((THOUGHTS, PLAIN, torch.ones(1, 2, dtype=torch.bool)), {}, r"mask \(1, 1, 2\)"),
        ((THOUGHTS, PLAIN, torch.ones(1, 3, 3, dtype=torch.bool)), {}, "mask"),
        ((THOUGHTS, PLAIN), {"discount": 1.5}, "discount 1.5"),
        ((THOUGHTS, PLAIN), {"reduction": "max"}, "'max'"),
        ((THOUGHTS, PLAIN), {"clip": 0.0}, "clip 0.0"),
    ],
)
def test_wrong_arguments_are_refused(
    arguments: tuple[Any, ...], options: dict[str, Any], message: str, unchecked: None
) -> None:
    with pytest.raises(ValueError, match=message):
        information_gain(*arguments, **options)
