"""Chunked log-probabilities equal full ones, forward and backward, in less memory."""

import importlib
import math
from typing import Any

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rewards import row_entropies, token_logps, token_logps_from_logits
from tests.builders.heads import Watch, problem

logit_tiles = importlib.import_module("rewards.logit_tiles")


def full(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    temperature: Any = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
) -> Tensor:
    logits = hidden @ weight.T
    logits = (logits if bias is None else logits + bias) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return token_logps_from_logits(logits, labels, temperature)


def test_golden_values() -> None:
    hidden, weight = torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, 0.0], [-1.0, math.log(3)]])
    expected = [1 - math.log(math.e + 1 + 1 / math.e), math.log(3 / 5)]
    assert token_logps(hidden, weight, torch.tensor([0, 2])).tolist() == pytest.approx(expected, abs=1e-6)
    # By hand at temperature 1/2: logits 2, 0, -2.
    halved = token_logps(hidden[:1], weight, torch.tensor([1]), temperature=0.5)
    assert halved.item() == pytest.approx(-math.log(math.e**2 + 1 + math.e**-2), abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    chunk=st.integers(1, 50),
    block=st.integers(1, 12),
    rows=st.integers(1, 12),
    softcap=st.sampled_from([None, 2.0]),
    scale=st.sampled_from([1.0, 0.25]),
    heat=st.sampled_from(["one", "number", "rows"]),
    with_bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_equals_full_logits_whatever_the_chunks(
    chunk: int,
    block: int,
    rows: int,
    softcap: float | None,
    scale: float,
    heat: str,
    with_bias: bool,
    seed: int,
) -> None:
    hidden, weight, bias, labels = problem(rows, dtype=torch.float32, seed=seed)
    temperature = {"one": 1.0, "number": 0.7, "rows": torch.linspace(0.5, 2.0, rows)}[heat]
    options: dict[str, Any] = {
        "bias": bias if with_bias else None,
        "temperature": temperature,
        "softcap": softcap,
        "scale": scale,
    }
    inputs = (hidden, weight, bias) if with_bias else (hidden, weight)
    direction = torch.randn(rows, generator=torch.Generator().manual_seed(seed))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logit_tiles, "tile_shape", lambda _: (block, 2048))
        chunked = token_logps(hidden, weight, labels, chunk_size=chunk, **options)
        gradients = torch.autograd.grad(chunked, inputs, direction)
        entropies = row_entropies(
            hidden, weight, chunk_size=chunk, bias=options["bias"], softcap=softcap, scale=scale
        )
    reference = full(hidden, weight, labels, **options)
    torch.testing.assert_close(chunked, reference, atol=1e-5, rtol=0)
    for ours, theirs in zip(gradients, torch.autograd.grad(reference, inputs, direction), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    every = torch.stack(
        [
            full(hidden, weight, torch.full_like(labels, token), options["bias"], 1.0, softcap, scale)
            for token in range(weight.shape[0])
        ],
        -1,
    )
    torch.testing.assert_close(entropies, -(every.exp() * every).sum(-1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_gradients_by_finite_differences(softcap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logit_tiles, "tile_shape", lambda _: (2, 2048))
    hidden, weight, bias, labels = problem(rows=5, hidden=3, vocabulary=7)
    labels[1] = -100
    heat = torch.linspace(0.5, 2.0, 5, dtype=torch.float64)

    def logps(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return token_logps(
            hidden, weight, labels, bias=bias, temperature=heat, chunk_size=3, softcap=softcap, scale=1.3
        )

    assert torch.autograd.gradcheck(logps, (hidden, weight, bias))


def test_never_holds_rows_times_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logit_tiles, "tile_shape", lambda _: (16, 2048))
    hidden, weight, bias, labels = problem(rows=64, hidden=4, vocabulary=1000, dtype=torch.float32)
    with Watch() as watch:
        token_logps(
            hidden, weight, labels, bias=bias, chunk_size=50, softcap=5.0, temperature=0.8
        ).sum().backward()
        row_entropies(hidden, weight, chunk_size=50)
    assert (
        watch.largest == weight.numel() < 64 * 1000
    )  # the gradient of the weight is the largest tensor there is
    assert hidden.grad is not None and weight.grad is not None and bias.grad is not None


def test_frozen_inputs_cost_no_product() -> None:
    hidden, weight, _, labels = problem(dtype=torch.float32)
    products = {}
    cases = {
        "both": (hidden, weight),
        "hidden": (hidden, weight.detach()),
        "weight": (hidden.detach(), weight),
    }
    for name, inputs in cases.items():
        with Watch() as watch:
            token_logps(*inputs, labels).sum().backward()
        products[name] = watch.calls["mm"] + watch.calls["addmm_"]
    assert products == {"both": 4, "hidden": 3, "weight": 3}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logit_tiles, "tile_shape", lambda _: (8, 2048))
    hidden, weight, bias, labels = problem(rows=512, hidden=16, vocabulary=64, dtype=dtype)
    logps = token_logps(hidden, weight, labels, bias=bias, chunk_size=10)
    assert logps.dtype == torch.float32
    # The product is rounded as the model's own head rounds it; everything after is fp32. A CPU's kernels may
    # add in an order that depends on the number of rows: then a logit now and then is the next number of its
    # type.
    logits = (hidden @ weight.T).float()
    exact = (logits + bias.float()).log_softmax(-1).gather(1, labels.unsqueeze(1)).squeeze(1)
    apart = (logps - exact).abs()
    assert (apart <= 1e-5).float().mean() >= 0.98 and apart.max() <= 2 * torch.finfo(
        dtype
    ).eps * logits.abs().max()
    ours = torch.autograd.grad(logps.sum(), (hidden, weight, bias))
    wide = [x.detach().float().requires_grad_() for x in (hidden, weight, bias)]
    theirs = torch.autograd.grad(full(wide[0], wide[1], labels, wide[2]).sum(), wide)
    for a, b in zip(ours, theirs, strict=True):
        # 64 row blocks summed in the narrow type would be off by several percent.
        assert a.dtype == dtype and (a.float() - b).norm() / b.norm() < 0.01


def test_mixed_types_use_the_wider_and_autocast_does_not_reach_in() -> None:
    hidden, weight, _, labels = problem(dtype=torch.float32)
    narrow = hidden.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = token_logps(narrow, weight, labels)
    torch.testing.assert_close(mixed, full(narrow.float(), weight, labels), atol=1e-5, rtol=0)
    gradients = torch.autograd.grad(mixed.sum(), (narrow, weight))
    assert [g.dtype for g in gradients] == [torch.bfloat16, torch.float32]


@pytest.mark.parametrize("make", [torch.zeros, lambda *shape: torch.full(shape, -100)])
def test_no_rows_and_only_uncounted_rows_give_zero_gradients(make: Any) -> None:
    hidden, weight, bias, _ = problem(dtype=torch.float32)
    labels = make(0).long() if make is torch.zeros else make(hidden.shape[0])
    logps = token_logps(hidden[: len(labels)], weight, labels, bias=bias)
    assert logps.shape == labels.shape and not logps.any()
    logps.sum().backward()
    for leaf in (hidden, weight, bias):
        assert leaf.grad is not None and leaf.grad.shape == leaf.shape and not leaf.grad.any()
    assert row_entropies(hidden[:0], weight).shape == (0,)


def test_uncounted_rows_are_zero_without_gradient_and_may_hold_nan() -> None:
    hidden, weight, _, labels = problem(dtype=torch.float32)
    labels[::2] = -100
    spoilt = hidden.detach().clone()
    spoilt[::2] = torch.nan
    spoilt.requires_grad_()
    logps = token_logps(spoilt, weight, labels)
    torch.testing.assert_close(logps, full(hidden, weight, labels), atol=1e-5, rtol=0)
    logps.sum().backward()
    assert spoilt.grad is not None and weight.grad is not None
    assert not spoilt.grad[::2].any() and spoilt.grad[1::2].any() and weight.grad.isfinite().all()


def test_leading_dimensions_are_kept() -> None:
    hidden, weight, _, labels = problem(rows=12)
    heat = torch.linspace(0.5, 1.5, 12, dtype=torch.float64)
    flat = token_logps(hidden, weight, labels, temperature=heat)
    shaped = token_logps(
        hidden.view(2, 3, 2, 8), weight, labels.view(2, 3, 2), temperature=heat.view(2, 3, 2)
    )
    assert torch.equal(shaped, flat.view(2, 3, 2))
    assert row_entropies(hidden.view(3, 4, 8), weight).shape == (3, 4)
    assert token_logps(hidden[0], weight, labels[0]).shape == ()


def test_nan_and_infinite_logits() -> None:
    hidden, weight, _, labels = problem(dtype=torch.float32)
    poisoned = hidden.detach().clone()
    poisoned[3] = torch.nan
    logps = token_logps(poisoned, weight, labels)
    assert logps.isnan().tolist() == [row == 3 for row in range(10)]
    # Forbidden tokens, here the whole first tile: probability 0, and an impossible label has log-probability
    # -inf.
    bias = torch.zeros(37)
    bias[:5] = -torch.inf
    labels[0], labels[1:] = 2, labels[1:].clamp(min=5)
    logps = token_logps(hidden, weight, labels, bias=bias, chunk_size=5)
    torch.testing.assert_close(logps, full(hidden, weight, labels, bias), atol=1e-5, rtol=0)
    assert logps[0] == -torch.inf
    gradient = torch.autograd.grad(logps[1:].sum(), weight)[0]
    assert gradient.isfinite().all() and not gradient[:5].any()
    assert row_entropies(hidden, weight, bias=bias, chunk_size=5).isfinite().all()


def test_a_parameter_emptied_between_forward_and_backward() -> None:
    """What ZeRO-3 does: the storage goes after the forward pass and comes back before the backward one."""
    hidden, weight, _, labels = problem(dtype=torch.float32)
    parameter = torch.nn.Parameter(weight.detach().clone())
    logps = token_logps(hidden, parameter, labels)
    data, parameter.data = parameter.data, torch.empty(0)
    parameter.data = data.clone()
    logps.sum().backward()
    expected = torch.autograd.grad(full(hidden, weight, labels).sum(), weight)[0]
    assert parameter.grad is not None
    torch.testing.assert_close(parameter.grad, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.0}, "above 0"),
        ({"temperature": -1.0}, "above 0"),
        ({"temperature": math.inf}, "finite"),
        ({"temperature": torch.tensor([1.0, 0.0])}, "above 0"),
        ({"temperature": torch.ones(3)}, r"\(3,\).*\(2,\)"),
        ({"labels": torch.tensor([0, 37])}, "37 is outside.*mark rows"),
        ({"labels": torch.tensor([0, -1])}, "-1 is outside"),
        ({"labels": torch.tensor([0])}, r"labels \(1,\).*hidden \(2, 8\)"),
        ({"bias": torch.zeros(5)}, r"bias \(5,\)"),
        ({"hidden": torch.zeros(2, 9)}, r"hidden \(2, 9\).*\(37, 8\)"),
        ({"chunk_size": 0}, "chunk_size 0"),
        ({"softcap": 0.0}, "softcap 0.0"),
    ],
)
def test_wrong_arguments_are_refused(changes: dict[str, Any], message: str, unchecked: None) -> None:
    hidden, weight, _, labels = problem(rows=2, dtype=torch.float32)
    arguments: dict[str, Any] = {"hidden": hidden, "lm_head_weight": weight, "labels": labels} | changes
    with pytest.raises(ValueError, match=message):
        token_logps(**arguments)


def test_annotations_are_checked_here() -> None:
    with pytest.raises(jaxtyping.TypeCheckError):
        token_logps(torch.zeros(2, 9), torch.zeros(37, 8), torch.tensor([0, 1]))
