"""K labels a row, and the likeliest tokens, equal those of full logits, forward and backward."""

from __future__ import annotations

import importlib
from functools import lru_cache, partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rewards import candidate_logps, fused_tiles, token_logps, top_logps
from tests.builders.heads import Watch, problem

logit_tiles = importlib.import_module("rewards.logit_tiles")


def full(hidden: Tensor, weight: Tensor, bias: Any, temperature: Any, softcap: Any, scale: float) -> Tensor:
    """log p [N, V] from full logits."""
    logits = hidden @ weight.T
    logits = (logits if bias is None else logits + bias) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return (logits / torch.as_tensor(temperature).expand(len(hidden))[:, None]).log_softmax(-1)


def read(logps: Tensor, labels: Tensor) -> Tensor:
    """The values of `labels` [N, K]: −1 is the mean over the vocabulary, −100 gives 0."""
    values = logps.gather(1, labels.clamp(min=0))
    values = torch.where(labels == -1, logps.mean(1, keepdim=True), values)
    return values.masked_fill(labels == -100, 0.0)


@settings(max_examples=15, deadline=None)
@given(
    chunk=st.integers(1, 50),
    block=st.integers(1, 12),
    rows=st.integers(1, 12),
    count=st.integers(1, 40),
    softcap=st.sampled_from([None, 2.0]),
    heat=st.sampled_from(["one", "number", "rows"]),
    with_bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_equals_full_logits_whatever_the_chunks(chunk, block, rows, count, softcap, heat, with_bias, seed):
    hidden, weight, bias, _ = problem(rows, seed=seed)
    bias = bias if with_bias else None
    heats = torch.linspace(0.5, 2.0, rows, dtype=torch.float64)
    temperature = {"one": 1.0, "number": 0.7, "rows": heats}[heat]
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(-1, len(weight), (rows, 5), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = -100
    labels[0, :2] = 3  # a token may stand twice
    direction = torch.randn(labels.shape, generator=generator, dtype=torch.float64)
    form: dict[str, Any] = {"bias": bias, "temperature": temperature, "softcap": softcap, "scale": 0.25}
    inputs = (hidden, weight) if bias is None else (hidden, weight, bias)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logit_tiles, "tile_shape", lambda _: (block, 2048))
        ours = candidate_logps(hidden, weight, labels, chunk_size=chunk, **form)
        gradients = torch.autograd.grad(ours, inputs, direction)
        ids, tops = top_logps(hidden, weight, count, chunk_size=chunk, **form)
    reference = full(hidden, weight, bias, temperature, softcap, 0.25)
    theirs = read(reference, labels)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    for mine, other in zip(gradients, torch.autograd.grad(theirs, inputs, direction), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-11, rtol=1e-10)
    best = full(hidden, weight, bias, temperature, softcap, 0.25).topk(min(count, len(weight)), 1)
    torch.testing.assert_close(tops, best.values, atol=1e-12, rtol=0)
    assert torch.equal(ids, best.indices)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_gradients_by_finite_differences(softcap, monkeypatch):
    monkeypatch.setattr(logit_tiles, "tile_shape", lambda _: (2, 2048))
    hidden, weight, bias, _ = problem(rows=4, hidden=3, vocabulary=7)
    labels = torch.tensor([[0, 6, 6], [-1, 2, -100], [-100, -100, -100], [5, -1, -1]])
    heat = torch.linspace(0.5, 2.0, 4, dtype=torch.float64)

    def logps(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        form: dict[str, Any] = {"bias": bias, "temperature": heat, "softcap": softcap, "scale": 1.3}
        return candidate_logps(hidden, weight, labels, chunk_size=3, **form)

    assert torch.autograd.gradcheck(logps, (hidden, weight, bias))


def test_never_holds_rows_times_vocabulary(monkeypatch):
    monkeypatch.setattr(logit_tiles, "tile_shape", lambda _: (16, 2048))
    hidden, weight, bias, _ = problem(rows=64, hidden=4, vocabulary=1000, dtype=torch.float32)
    labels = torch.arange(64 * 9).view(64, 9) - 1
    with Watch() as watch:
        form: dict[str, Any] = {"bias": bias, "chunk_size": 50, "softcap": 5.0, "temperature": 0.8}
        candidate_logps(hidden, weight, labels, **form).sum().backward()
        top_logps(hidden, weight, 9, **form)
    assert watch.largest == weight.numel() < 64 * 1000  # the gradient of the weight


def test_one_label_is_token_logps_and_all_labels_have_a_mass_of_one():
    hidden, weight, _, labels = problem()
    assert torch.equal(
        candidate_logps(hidden, weight, labels[:, None])[:, 0], token_logps(hidden, weight, labels)
    )
    every = torch.arange(len(weight)).expand(len(hidden), -1)
    logps = candidate_logps(hidden, weight, every, chunk_size=10)
    assert torch.allclose(logps.exp().sum(1), torch.ones(len(hidden), dtype=torch.float64))
    gradient = torch.autograd.grad((logps.detach().exp() * logps).sum(), hidden)[0]  # E_p ∇ log p = 0
    assert float(gradient.abs().max()) < 1e-14


def test_a_row_without_labels_is_not_computed():
    hidden, weight, _, _ = problem(rows=3)
    with torch.no_grad():
        hidden[1] = torch.nan
    labels = torch.tensor([[1, 2], [-100, -100], [-100, 4]])
    logps = candidate_logps(hidden, weight, labels)
    logps.sum().backward()
    assert logps[1].tolist() == [0.0, 0.0] and logps[2, 0] == 0
    assert hidden.grad is not None and weight.grad is not None
    assert not hidden.grad[1].any() and bool(hidden.grad.isfinite().all() and weight.grad.isfinite().all())


def test_no_rows():
    hidden, weight, _, _ = problem(rows=0)
    logps = candidate_logps(hidden, weight, torch.zeros(0, 3, dtype=torch.int64))
    logps.sum().backward()
    assert logps.shape == (0, 3) and weight.grad is not None and not weight.grad.any()
    ids, tops = top_logps(hidden, weight, 4)
    assert ids.shape == tops.shape == (0, 4)


@pytest.mark.parametrize(
    ("labels", "match"),
    [
        (torch.zeros(10, 2, dtype=torch.int64) + 37, "label 37 is outside"),
        (torch.zeros(10, 2, dtype=torch.int64) - 2, "label -2 is outside"),
        (torch.zeros(10, 0, dtype=torch.int64), "at least 1"),
    ],
)
def test_bad_labels_are_refused(labels, match):
    hidden, weight, _, _ = problem()
    with pytest.raises(ValueError, match=match):
        candidate_logps(hidden, weight, labels)
    with pytest.raises(ValueError, match="count must be at least 1"):
        top_logps(hidden, weight, 0)


def test_fused_tiles_give_the_numbers_of_plain_ones(monkeypatch):
    monkeypatch.setattr(logit_tiles, "tile_shape", lambda _: (8, 2048))
    make = partial(torch.compile, dynamic=True, fullgraph=True, backend="eager")
    monkeypatch.setattr(fused_tiles, "compiled", lru_cache(lambda f, *form: make(partial(f, *form))))
    for rows, vocabulary, chunk in ((21, 50, 12), (10, 33, 7)):
        hidden, weight, bias, _ = problem(rows, 6, vocabulary, torch.float32)
        labels = torch.randint(-1, vocabulary, (rows, 6), generator=torch.Generator().manual_seed(1))
        temperature, inputs = torch.linspace(0.5, 2.0, rows), (hidden, weight, bias)
        form: dict[str, Any] = {"bias": bias, "softcap": 2.0, "scale": 0.5}
        results = []
        for fused in (False, True):
            monkeypatch.setattr(fused_tiles, "can_fuse", lambda x, fused=fused: fused)
            logps = candidate_logps(hidden, weight, labels, temperature=temperature, chunk_size=chunk, **form)
            direction = torch.linspace(-1, 2, labels.numel()).view(labels.shape)
            results.append((logps, *torch.autograd.grad(logps, inputs, direction)))
        for ours, theirs in zip(results[1], results[0], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_many_labels_are_read_by_plain_tiles(monkeypatch):
    """On a GPU each label of a fused tile costs operations for every logit."""

    def refuse(*args: Any) -> None:
        raise AssertionError("a fused tile")

    monkeypatch.setattr(fused_tiles, "can_fuse", lambda x: True)
    monkeypatch.setattr(fused_tiles, "compiled", refuse)
    hidden, weight, _, _ = problem()
    labels = torch.arange(fused_tiles.MOST_LABELS + 1).expand(len(hidden), -1)
    candidate_logps(hidden, weight, labels).sum().backward()
    with pytest.raises(AssertionError, match="a fused tile"):
        candidate_logps(hidden, weight, labels[:, 1:])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("count", [5, 32, 40])
def test_kernels_of_a_gpu_give_the_numbers_of_a_cpu(count):
    """Up to 32 labels a row are one kernel for each tile, and more are plain tiles."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(3000, 64, generator=generator), torch.randn(20000, 64, generator=generator)
    labels = torch.randint(-1, 20000, (3000, count), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = -100
    direction = torch.randn(labels.shape, generator=generator)
    results = []
    for device in ("cpu", "cuda"):
        made = [x.to(device).requires_grad_() for x in (hidden, weight)]
        logps = candidate_logps(*made, labels.to(device))
        results.append((logps, *torch.autograd.grad((logps * direction.to(device)).sum(), made)))
    for ours, theirs in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-4, atol=5e-3)
    tokens, values = top_logps(hidden.cuda(), weight.cuda(), 4)
    same, expected = top_logps(hidden, weight, 4)
    torch.testing.assert_close(values.cpu(), expected, rtol=1e-4, atol=1e-4)
    assert (tokens.cpu() == same).float().mean() > 0.999
