"""Tiles of the logits of an output head: a block of rows by a range of the vocabulary.

`rewards.likelihood` processes the logits tile by tile. This module computes a tile, decides its size and
dtype, and holds the operations on it, which work in place.

Shapes: N rows of the tile, C of its columns (vocabulary entries), H hidden.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class HeadOptions:
    """How hidden @ weight.T becomes logits, softcap(scale · (product + bias)), and the columns per tile."""

    scale: float
    softcap: float | None
    chunk_size: int


def check_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
    chunk_size: int | None,
) -> HeadOptions:
    """Return the options of a head; ValueError if its tensors do not fit each other or an option is wrong."""
    if weight.ndim != 2 or hidden.ndim < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} must end in the second dimension of lm_head_weight "
            f"{tuple(weight.shape)}: pass [..., H] and [V, H]"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias {tuple(bias.shape)} must have one entry per row of lm_head_weight {tuple(weight.shape)}"
        )
    if chunk_size is None:
        _, chunk_size = tile_shape(hidden.device.type)
    if (softcap is not None and not softcap > 0) or chunk_size < 1:
        raise ValueError(
            f"softcap {softcap} must be None or above 0, chunk_size {chunk_size} must be at least 1"
        )
    return HeadOptions(float(scale), softcap, chunk_size)


def logit_tile(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, temperatures: Tensor | None, options: HeadOptions
) -> Tensor:
    """Return logits / temperature [N, C] in fp32 (or float64). The caller may overwrite the tensor."""
    product = multiply(hidden, weight)
    tile = product.to(sum_dtype(product.dtype))
    if bias is not None:
        tile.add_(bias)
    if options.scale != 1:
        tile.mul_(options.scale)
    if options.softcap is not None:
        tile.div_(options.softcap).tanh_().mul_(options.softcap)
    return tile if temperatures is None else tile.div_(temperatures.unsqueeze(1))


def multiply(hidden: Tensor, weight: Tensor) -> Tensor:
    """Return hidden @ weight.T [N, C] in the common dtype of the two."""
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    return hidden.to(dtype) @ weight.to(dtype).T


def exponentiate(tile: Tensor, maximum: Tensor) -> Tensor:
    """Turn a tile of logits into exp(logits − maximum), in place.

    `maximum` [N] is first raised, in place, to the largest logit of its row. Returns the old maximum minus
    the new one: the log of the factor that rescales sums taken around the old maximum.
    """
    raised = torch.maximum(maximum, tile.amax(1))
    log_rescale = maximum - raised
    tile.sub_(raised.unsqueeze(1)).exp_()
    maximum.copy_(raised)
    return log_rescale


def differentiate(
    tile: Tensor,
    labels: Tensor,
    columns: slice,
    log_normaliser: Tensor,
    temperatures: Tensor | None,
    options: HeadOptions,
    pulls: Tensor | None = None,
    spread: Tensor | None = None,
) -> None:
    """Turn a tile of logits / temperature into (softmax − onehot) · d capped / d uncapped, in place.

    With several labels a row [N, K], their gradients `pulls` [N, K] are part of it: (Σ_k pulls_k) · softmax −
    Σ_k pulls_k · onehot_k − `spread` [N], which every token gets.
    """
    slope = None
    if options.softcap is not None:
        slope = _softcap_slope(tile, temperatures, options.softcap)
    tile.sub_(log_normaliser.unsqueeze(1)).exp_()
    inside, column = locate_labels(labels, columns)
    if pulls is None:
        tile.scatter_add_(1, column, -inside.unsqueeze(1).to(tile.dtype))
    else:
        tile.mul_(pulls.sum(1, keepdim=True))
        tile.scatter_add_(1, column, torch.where(inside, -pulls, 0.0))
    if spread is not None:
        tile.sub_(spread.unsqueeze(1))
    if slope is not None:
        tile.mul_(slope)


def _softcap_slope(tile: Tensor, temperatures: Tensor | None, softcap: float) -> Tensor:
    """Return d capped / d uncapped = 1 − (capped / softcap)² from a tile of capped logits / temperature."""
    if temperatures is None:
        return 1 - (tile / softcap).square_()
    return 1 - (tile * (temperatures / softcap).unsqueeze(1)).square_()


def locate_labels(labels: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Return which labels lie in a tile's columns [N], and at which of them [N, 1].

    Both are [N, K] for labels [N, K]. A label outside gets an arbitrary column of the tile, so that it can be
    passed to gather and scatter.
    """
    inside = (labels >= columns.start) & (labels < columns.stop)
    column = (labels - columns.start).clamp(0, columns.stop - columns.start - 1)
    return inside, column.view(len(labels), 1) if labels.ndim == 1 else column


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to `total`, in the dtype of `total`."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)


def column_slices(weight: Tensor, chunk_size: int) -> Iterator[slice]:
    """Yield ranges of at most `chunk_size` vocabulary entries."""
    return _slices(weight.shape[0], chunk_size)


def row_slices(rows: Tensor) -> Iterator[slice]:
    """Yield the blocks of rows that a tile has."""
    return _slices(rows.shape[0], tile_shape(rows.device.type)[0])


def _slices(total: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


def tile_shape(device: str) -> tuple[int, int]:
    """Return the most rows and columns of a tile: few large ones, on a CPU small ones that stay in cache."""
    return (1024, 2048) if device == "cpu" else (8192, 8192)


def select(values: Tensor | None, index: slice | Tensor) -> Tensor | None:
    """Return values[index], or None if there are no values."""
    return None if values is None else values[index]


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which sums over inputs of `dtype` are taken: fp32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)
