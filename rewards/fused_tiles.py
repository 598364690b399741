"""The arithmetic on a tile of logits as single kernels, compiled by torch for an accelerator.

Each function reads the matrix product of a tile once and writes only what is left of it; in
`rewards.logit_tiles` every operation reads and writes the tile in fp32. On an H100 this saved .089 of the
.575 s of a training step (docs/gpu.md). Shapes: N rows of the tile, C of its columns.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from rewards.logit_tiles import HeadOptions, sum_dtype

MOST_LABELS = 32
"""Labels of a row that are computed here; each adds a comparison for every logit of a tile."""


def can_fuse(x: Tensor) -> bool:
    """Whether tiles on the device of `x` are computed here: a GPU for which Triton writes kernels."""
    return (
        x.is_cuda and find_spec("triton") is not None and torch.cuda.get_device_capability(x.device)[0] >= 8
    )


def fold(
    product: Tensor,
    bias: Tensor | None,
    temperatures: Tensor | None,
    labels: Tensor,
    start: int,
    sums: tuple[Tensor, Tensor, Tensor],
    options: HeadOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """Add a tile to the running sums of its rows: (largest logit, Σ exp(logit − largest), label's logit).

    Args:
        product: [N, C] hidden @ weight.T for the columns from `start` on.
        labels: [N] token ids.
        sums: three times [N], in the dtype of the sums; the result replaces them.
    """
    function = compiled(_fold, options.scale, options.softcap)
    allow_compilations()
    return function(product, bias, temperatures, labels - start, *sums)


def gradient_of(
    product: Tensor,
    bias: Tensor | None,
    temperatures: Tensor | None,
    labels: Tensor,
    start: int,
    log_normaliser: Tensor,
    options: HeadOptions,
) -> Tensor:
    """(softmax − onehot) · d capped / d uncapped [N, C] of a tile, in the dtype of `product`."""
    function = compiled(_gradient_of, options.scale, options.softcap)
    allow_compilations()
    return function(product, bias, temperatures, labels - start, log_normaliser)


def fold_several(
    product: Tensor,
    bias: Tensor | None,
    temperatures: Tensor | None,
    labels: Tensor,
    start: int,
    sums: tuple[Tensor, Tensor, Tensor, Tensor],
    options: HeadOptions,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `fold` for labels [N, K], whose logits [N, K] are the third sum; the fourth is the sum of logits."""
    function = compiled(_fold_several, options.scale, options.softcap)
    allow_compilations()
    return function(product, bias, temperatures, labels - start, *sums)


def gradient_of_several(
    product: Tensor,
    bias: Tensor | None,
    temperatures: Tensor | None,
    labels: Tensor,
    start: int,
    log_normaliser: Tensor,
    pulls: Tensor,
    spread: Tensor,
    options: HeadOptions,
) -> Tensor:
    """What `logit_tiles.differentiate` makes of a tile with several labels, in the dtype of `product`."""
    function = compiled(_gradient_of_several, options.scale, options.softcap)
    allow_compilations()
    return function(product, bias, temperatures, labels - start, log_normaliser, pulls, spread)


@lru_cache(maxsize=16)
def compiled(function: Callable[..., Any], scale: float, softcap: float | None) -> Callable[..., Any]:
    """The function for heads of this form, compiled for all numbers of rows and columns at once."""
    return torch.compile(partial(function, scale, softcap), dynamic=True, fullgraph=True)


def allow_compilations(most: int = 64) -> None:
    """Let torch compile a function `most` times before it gives up or raises an error, not 8, in this thread.

    Forms of inputs are soon more than 8: dtypes, with and without gradient, a bias, a window, adapters, one
    row. Settings of dynamo are a thread's own (torch 2.13), and a backward pass on a GPU, with the layers
    that it recomputes, is in another thread than the forward pass: call this before each compiled call.
    """
    if torch._dynamo.config.recompile_limit < most:
        torch._dynamo.config.recompile_limit = most


def _logits(
    scale: float, softcap: float | None, product: Tensor, bias: Tensor | None, temperatures: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Logits / temperature [N, C], and d capped / d uncapped."""
    logits, slope = product.to(sum_dtype(product.dtype)), None
    if bias is not None:
        logits = logits + bias
    logits = scale * logits
    if softcap is not None:
        bent = torch.tanh(logits / softcap)
        logits, slope = softcap * bent, 1 - bent.square()
    return (logits if temperatures is None else logits / temperatures.unsqueeze(1)), slope


def _fold(
    scale: float,
    softcap: float | None,
    product: Tensor,
    bias: Tensor | None,
    temperatures: Tensor | None,
    columns: Tensor,
    maximum: Tensor,
    total: Tensor,
    label_logits: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """`columns` [N] is the label's column in this tile, or outside it."""
    logits, _ = _logits(scale, softcap, product, bias, temperatures)
    is_inside = (columns >= 0) & (columns < product.shape[1])
    labelled = logits.gather(1, columns.clamp(0, product.shape[1] - 1).unsqueeze(1)).squeeze(1)
    raised = torch.maximum(maximum, logits.amax(1))
    total = total * (maximum - raised).exp() + (logits - raised.unsqueeze(1)).exp().sum(1)
    return raised, total, torch.where(is_inside, labelled, label_logits)


def _gradient_of(
    scale: float,
    softcap: float | None,
    product: Tensor,
    bias: Tensor | None,
    temperatures: Tensor | None,
    columns: Tensor,
    log_normaliser: Tensor,
) -> Tensor:
    """As `gradient_of`; `columns` as in `_fold`."""
    logits, slope = _logits(scale, softcap, product, bias, temperatures)
    probabilities = (logits - log_normaliser.unsqueeze(1)).exp()
    is_label = torch.arange(product.shape[1], device=product.device) == columns.unsqueeze(1)
    gradient = probabilities - is_label.to(probabilities.dtype)
    return (gradient if slope is None else gradient * slope).to(product.dtype)


def _fold_several(
    scale: float,
    softcap: float | None,
    product: Tensor,
    bias: Tensor | None,
    temperatures: Tensor | None,
    columns: Tensor,
    maximum: Tensor,
    total: Tensor,
    label_logits: Tensor,
    logit_sums: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`columns` [N, K] as in `_fold`."""
    logits, _ = _logits(scale, softcap, product, bias, temperatures)
    is_inside = (columns >= 0) & (columns < product.shape[1])
    labelled = logits.gather(1, columns.clamp(0, product.shape[1] - 1))
    raised = torch.maximum(maximum, logits.amax(1))
    total = total * (maximum - raised).exp() + (logits - raised.unsqueeze(1)).exp().sum(1)
    labels = torch.where(is_inside, labelled, label_logits)
    return raised, total, labels, logit_sums + logits.sum(1)


def _gradient_of_several(
    scale: float,
    softcap: float | None,
    product: Tensor,
    bias: Tensor | None,
    temperatures: Tensor | None,
    columns: Tensor,
    log_normaliser: Tensor,
    pulls: Tensor,
    spread: Tensor,
) -> Tensor:
    """As `gradient_of_several`; `columns` as in `_fold_several`."""
    logits, slope = _logits(scale, softcap, product, bias, temperatures)
    probabilities = (logits - log_normaliser.unsqueeze(1)).exp()
    gradient = probabilities * pulls.sum(1, keepdim=True) - spread.unsqueeze(1)
    places = torch.arange(product.shape[1], device=product.device)
    for column, pull in zip(columns.unbind(1), pulls.unbind(1), strict=True):
        is_label = places == column.unsqueeze(1)
        gradient = gradient - is_label.to(gradient.dtype) * pull.unsqueeze(1)
    return (gradient if slope is None else gradient * slope).to(product.dtype)
