"""The differentiable read of log-probabilities from hidden states, tile by tile: one label a row, or several.

`rewards.token_logps` and `rewards.candidate_logps` check their arguments and call `TiledLogps`. Shapes: N
rows, K labels of a row, H hidden, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rewards import fused_tiles
from rewards.logit_tiles import (
    HeadOptions,
    add_product,
    column_slices,
    differentiate,
    exponentiate,
    locate_labels,
    logit_tile,
    multiply,
    row_slices,
    select,
    sum_dtype,
)

IGNORE = -100
"""A label that does not count."""
EVERY_TOKEN = -1
"""A label that stands for the whole vocabulary: its value is the mean of log p over all tokens."""


class TiledLogps(torch.autograd.Function):
    """Forward: running log-sum-exp over tiles. Backward: d logp / dz = (onehot − softmax(z / T)) / T.

    Labels are [N], or [N, K] for several tokens of a row. Then a label may be EVERY_TOKEN, and the gradient
    of a row is Σ_k g_k · onehot_k − (Σ_k g_k) · softmax(z / T), all over T.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        temperatures: Tensor | None,
        options: HeadOptions,
    ) -> Tensor:
        maximum = initial_maximum(hidden, weight)
        total, logit_sums = torch.zeros_like(maximum), torch.zeros_like(maximum)
        label_logits = maximum.new_zeros(labels.shape)
        several, fused = labels.ndim == 2, _can_fuse(hidden, labels)
        with torch.autocast(hidden.device.type, enabled=False):
            for v in column_slices(weight, options.chunk_size):
                for r in row_slices(hidden):
                    head = (select(bias, v), select(temperatures, r))
                    if fused:
                        product = multiply(hidden[r], weight[v])
                        sums = (maximum[r], total[r], label_logits[r])
                        where = (labels[r], v.start)
                        if several:
                            sums = (*sums, logit_sums[r])
                            sums = fused_tiles.fold_several(product, *head, *where, sums, options)
                            maximum[r], total[r], label_logits[r], logit_sums[r] = sums
                            continue
                        sums = fused_tiles.fold(product, *head, *where, sums, options)
                        maximum[r], total[r], label_logits[r] = sums
                        continue
                    tile = logit_tile(hidden[r], weight[v], *head, options)
                    inside, column = locate_labels(labels[r], v)
                    found = tile.gather(1, column).view(inside.shape)
                    label_logits[r] = torch.where(inside, found, label_logits[r])
                    if several:
                        logit_sums[r] += tile.sum(1)
                    log_rescale = exponentiate(tile, maximum[r])
                    total[r] = total[r] * log_rescale.exp_() + tile.sum(1)
        log_normaliser = maximum + total.log()
        # Save the parameter itself, not a view or a copy: ZeRO-3 empties its storage after the forward pass
        # and refills it before the backward pass.
        ctx.save_for_backward(hidden, weight, bias, labels, temperatures, log_normaliser)
        ctx.options = options
        if not several:
            return label_logits - log_normaliser
        means = (logit_sums / weight.shape[0]).unsqueeze(1)
        return torch.where(labels == EVERY_TOKEN, means, label_logits) - log_normaliser.unsqueeze(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_logps,) = grad_outputs
        hidden, weight, bias, labels, temperatures, log_normaliser = ctx.saved_tensors
        options = ctx.options
        product_dtype, dtype = torch.promote_types(hidden.dtype, weight.dtype), log_normaliser.dtype
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.zeros_like(hidden, dtype=dtype) if needs_hidden else None
        grad_weight = torch.zeros_like(weight) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=dtype) if needs_bias else None
        # Factors per row are applied to the [N, H] side, not to the tiles. The minus is there because a tile
        # holds softmax − onehot; with several labels, whose gradients differ, it holds their sum.
        pulls = grad_logps.to(dtype) if labels.ndim == 2 else None
        row_gradient = grad_logps.to(dtype) if pulls is None else torch.ones_like(log_normaliser)
        factor = -options.scale * row_gradient / (1.0 if temperatures is None else temperatures)
        fused = _can_fuse(hidden, labels)
        scaled_hidden = (hidden.to(dtype) * factor.unsqueeze(1)).to(product_dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            for v in column_slices(weight, options.chunk_size):
                columns = weight[v].to(product_dtype)
                # Sums over row blocks are taken in fp32, for one range of columns at a time: there is no fp32
                # copy of a whole bf16 weight.
                weight_sum = None if grad_weight is None else grad_weight[v].to(dtype)
                for r in row_slices(hidden):
                    head, row_temperatures = select(bias, v), select(temperatures, r)
                    spread = None if pulls is None else spread_pulls(pulls[r], labels[r], len(weight))
                    if fused:
                        product = multiply(hidden[r], columns)
                        where = (labels[r], v.start, log_normaliser[r])
                        form = (product, head, row_temperatures, *where)
                        if pulls is None or spread is None:
                            tile = fused_tiles.gradient_of(*form, options)
                        else:
                            tile = fused_tiles.gradient_of_several(*form, pulls[r], spread, options)
                    else:
                        tile = logit_tile(hidden[r], columns, head, row_temperatures, options)
                        where = (labels[r], v, log_normaliser[r], row_temperatures)
                        differentiate(tile, *where, options, select(pulls, r), spread)
                    if grad_bias is not None:
                        grad_bias[v].addmv_(tile.T.to(dtype), factor[r])
                    tile = tile.to(product_dtype)
                    if grad_hidden is not None:
                        add_product(grad_hidden[r], tile, columns)
                    if weight_sum is not None:
                        add_product(weight_sum, tile.T, scaled_hidden[r])
                if grad_weight is not None and weight_sum is not None and grad_weight.dtype != dtype:
                    grad_weight[v] = weight_sum  # with equal dtypes the two share memory
        if grad_hidden is not None:
            grad_hidden = grad_hidden.mul_(factor.unsqueeze(1)).to(hidden.dtype)
        if grad_bias is not None:
            grad_bias = grad_bias.to(bias.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None


def spread_pulls(pulls: Tensor, labels: Tensor, vocabulary: int) -> Tensor:
    """The part [N] of the gradients [N, K] that labels EVERY_TOKEN give to each token of the vocabulary."""
    return torch.where(labels == EVERY_TOKEN, pulls, 0.0).sum(1) / vocabulary


def _can_fuse(hidden: Tensor, labels: Tensor) -> bool:
    """Whether tiles are single kernels: with several labels only if they are few, each adds operations."""
    few = labels.ndim == 1 or labels.shape[1] <= fused_tiles.MOST_LABELS
    return few and fused_tiles.can_fuse(hidden)


def initial_maximum(rows: Tensor, weight: Tensor) -> Tensor:
    """Return the lowest finite number for each row [N].

    With −inf instead, a first tile of only −inf would add NaN, not 0.
    """
    dtype = sum_dtype(torch.promote_types(rows.dtype, weight.dtype))
    return rows.new_full((rows.shape[0],), torch.finfo(dtype).min, dtype=dtype)


def temperature_per_row(temperature: float | Tensor, rows: torch.Size, like: Tensor) -> Tensor | None:
    """Return one temperature per row [N], or None if the temperature is the number 1."""
    temperatures = torch.as_tensor(temperature, device=like.device).detach()
    if temperatures.ndim and temperatures.shape != rows:
        raise ValueError(
            f"temperature {tuple(temperatures.shape)} must be a number or have the shape of labels "
            f"{tuple(rows)}"
        )
    if not bool(((temperatures > 0) & temperatures.isfinite()).all()):
        raise ValueError(
            f"temperature must be finite and above 0, not {float(temperatures.min())}: greedy choice has no "
            "log-probability. Use 1 for targets and the sampling temperature for thoughts"
        )
    if not temperatures.ndim and float(temperatures) == 1:
        return None
    return temperatures.to(sum_dtype(like.dtype)).expand(rows).reshape(-1)
