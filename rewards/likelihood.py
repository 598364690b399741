"""Token log-probabilities straight from hidden states, without ever holding [tokens, vocabulary].

Shapes: N rows (tokens), H hidden, V vocabulary; ``...`` any leading dimensions, whose product is N.

The logits exist one tile at a time: ``chunk_size`` vocabulary entries by a block of rows. The forward pass
keeps a running log-sum-exp per row. The backward pass computes each tile again, turns it into probabilities
in place and adds its share to the gradients. That takes four matrix products where stored logits need three,
and the memory of one tile.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from rewards import fused_tiles
from rewards.logit_tiles import (
    HeadOptions,
    add_product,
    check_head,
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


def token_logps(
    hidden: Float[Tensor, "*N H"],
    lm_head_weight: Float[Tensor, "V H"],
    labels: Int[Tensor, "*N"],
    *,
    bias: Float[Tensor, " V"] | None = None,
    temperature: float | Float[Tensor, "*N"] = 1.0,
    chunk_size: int | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
) -> Float[Tensor, "*N"]:
    """Return log p(label | hidden) in nats for each row, in memory independent of rows × vocabulary.

    With z = scale · (hidden · weightᵀ + bias), capped to softcap · tanh(z / softcap) where the model does so,
    the result is z[label] / temperature − logsumexp(z / temperature). Gradients flow to hidden, weight and
    bias; each is computed only if it is needed. There is no second derivative.

    Precision: the products run in the inputs' common dtype, like the model's own head. Everything after them,
    and the sums of gradients over tiles, is fp32 (float64 for float64 inputs). Autocast is switched off
    inside. The result is fp32 (or float64). NaN or +inf in a row's logits makes that row NaN; a logit of −inf
    has probability 0, as in log_softmax.

    Args:
        labels: token ids in [0, V). −100 marks a row that does not count: its result is 0, its gradient is
            zero, and it is not computed, so its hidden state may hold anything.
        temperature: divides the final logits; one number, or one per row. Use 1 for targets and the sampling
            temperature for thoughts. Finite and above 0: greedy choice has no log-probability.
        chunk_size: vocabulary entries per tile; by default 8,192 on a GPU and 2,048 elsewhere. Any size gives
            the same numbers up to rounding.
        softcap: Gemma 2's final logit soft-capping (arXiv 2408.00118, §2); None for none.
        scale: multiplies the logits: Cohere's `logit_scale`, 1 / Granite's `logits_scaling`.

    Raises:
        ValueError: shapes that do not fit, a label outside the vocabulary, or a temperature, softcap or
            chunk_size of 0 or less. No rows at all is fine: the result is empty, and its backward gives zero
            gradients.

    Source: the running log-sum-exp is algorithm 3 of Milakov & Gimelshein (arXiv 1805.02867); recomputing
    logits in the backward pass is from Wijmans et al. (arXiv 2411.09009).

    >>> hidden, weight = torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 0.0], [0.0, 5.0]])
    >>> token_logps(hidden, weight, torch.tensor([0]))     # logits 2 and 0
    tensor([-0.1269])
    """
    options = check_head(hidden, lm_head_weight, bias, softcap, scale, chunk_size)
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"labels {tuple(labels.shape)} must have the shape of hidden {tuple(hidden.shape)} without "
            "its last dimension: one label per row"
        )
    rows, row_labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    temperatures = _temperature_per_row(temperature, labels, hidden)
    counted = row_labels != IGNORE
    outside = counted & ((row_labels < 0) | (row_labels >= lm_head_weight.shape[0]))
    if bool(outside.any()):
        raise ValueError(
            f"label {int(row_labels[outside][0])} is outside the vocabulary of lm_head_weight "
            f"{tuple(lm_head_weight.shape)}; mark rows that do not count with {IGNORE}"
        )
    if bool(counted.all()):
        logps = _TokenLogps.apply(rows, lm_head_weight, bias, row_labels, temperatures, options)
        return logps.view(labels.shape)
    index = counted.nonzero().squeeze(1)
    logps = _TokenLogps.apply(
        rows[index], lm_head_weight, bias, row_labels[index], select(temperatures, index), options
    )
    return logps.new_zeros(row_labels.shape).index_put((index,), logps).view(labels.shape)


def token_logps_from_logits(
    logits: Float[Tensor, "*N V"], labels: Int[Tensor, "*N"], temperature: float | Float[Tensor, "*N"] = 1.0
) -> Float[Tensor, "*N"]:
    """Return log p(label) in nats from existing logits: the plain version that `token_logps` must equal.

    fp32 (float64 for float64 logits). −100 labels give 0 with zero gradient; NaN and inf as in
    `torch.log_softmax`. Errors are those of `token_logps`, except that a label outside the vocabulary raises
    torch's own error.

    >>> token_logps_from_logits(torch.tensor([[2.0, 0.0]]), torch.tensor([0]))
    tensor([-0.1269])
    """
    temperatures = _temperature_per_row(temperature, labels, logits)
    scaled = logits.to(sum_dtype(logits.dtype))
    if temperatures is not None:
        scaled = scaled / temperatures.view(*labels.shape, 1)
    counted = labels != IGNORE
    safe_labels = labels.where(counted, 0)
    logps = scaled.log_softmax(-1).gather(-1, safe_labels.unsqueeze(-1)).squeeze(-1)
    return logps.where(counted, 0.0)


@torch.no_grad()
def row_entropies(
    hidden: Float[Tensor, "*N H"],
    lm_head_weight: Float[Tensor, "V H"],
    *,
    bias: Float[Tensor, " V"] | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    chunk_size: int | None = None,
) -> Float[Tensor, "*N"]:
    """Return the entropy in nats of each row's next-token distribution, tile by tile and without gradient.

    Between 0 and ln V. Entropy-based position sampling uses it. Arguments, errors, NaN and inf are those of
    `token_logps`; the temperature is 1. With weights w = exp(z − max z), the entropy is
    ln Σw − Σ w ln w / Σw.

    >>> row_entropies(torch.zeros(1, 3), torch.ones(8, 3))     # uniform over eight tokens: ln 8
    tensor([2.0794])
    """
    options = check_head(hidden, lm_head_weight, bias, softcap, scale, chunk_size)
    rows = hidden.reshape(-1, hidden.shape[-1])
    maximum = _initial_maximum(rows, lm_head_weight)
    total, moment = torch.zeros_like(maximum), torch.zeros_like(maximum)  # Σw and Σ w ln w
    with torch.autocast(rows.device.type, enabled=False):
        for v in column_slices(lm_head_weight, options.chunk_size):
            for r in row_slices(rows):
                tile = logit_tile(rows[r], lm_head_weight[v], select(bias, v), None, options)
                log_rescale = exponentiate(tile, maximum[r])
                rescale = log_rescale.exp()
                moment[r] = rescale * (moment[r] + total[r] * log_rescale) - torch.special.entr(tile).sum(1)
                total[r] = rescale * total[r] + tile.sum(1)
    return (total.log() - moment / total).view(hidden.shape[:-1])


class _TokenLogps(torch.autograd.Function):
    """Forward: running log-sum-exp over tiles. Backward: d logp / dz = (onehot − softmax(z / T)) / T."""

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
        maximum = _initial_maximum(hidden, weight)
        total, label_logits = torch.zeros_like(maximum), torch.zeros_like(maximum)
        fused = fused_tiles.can_fuse(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            for v in column_slices(weight, options.chunk_size):
                for r in row_slices(hidden):
                    head = (select(bias, v), select(temperatures, r))
                    if fused:
                        product = multiply(hidden[r], weight[v])
                        sums = (maximum[r], total[r], label_logits[r])
                        sums = fused_tiles.fold(product, *head, labels[r], v.start, sums, options)
                        maximum[r], total[r], label_logits[r] = sums
                        continue
                    tile = logit_tile(hidden[r], weight[v], *head, options)
                    inside, column = locate_labels(labels[r], v)
                    label_logits[r] = torch.where(inside, tile.gather(1, column).squeeze(1), label_logits[r])
                    log_rescale = exponentiate(tile, maximum[r])
                    total[r] = total[r] * log_rescale.exp_() + tile.sum(1)
        log_normaliser = maximum + total.log()
        # Save the parameter itself, not a view or a copy: ZeRO-3 empties its storage after the forward pass
        # and refills it before the backward pass.
        ctx.save_for_backward(hidden, weight, bias, labels, temperatures, log_normaliser)
        ctx.options = options
        return label_logits - log_normaliser

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
        # holds softmax − onehot.
        factor = -options.scale * grad_logps.to(dtype) / (1.0 if temperatures is None else temperatures)
        fused = fused_tiles.can_fuse(hidden)
        scaled_hidden = (hidden.to(dtype) * factor.unsqueeze(1)).to(product_dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            for v in column_slices(weight, options.chunk_size):
                columns = weight[v].to(product_dtype)
                # Sums over row blocks are taken in fp32, for one range of columns at a time: there is no fp32
                # copy of a whole bf16 weight.
                weight_sum = None if grad_weight is None else grad_weight[v].to(dtype)
                for r in row_slices(hidden):
                    head, row_temperatures = select(bias, v), select(temperatures, r)
                    if fused:
                        product = multiply(hidden[r], columns)
                        where = (labels[r], v.start, log_normaliser[r])
                        tile = fused_tiles.gradient_of(product, head, row_temperatures, *where, options)
                    else:
                        tile = logit_tile(hidden[r], columns, head, row_temperatures, options)
                        differentiate(tile, labels[r], v, log_normaliser[r], row_temperatures, options)
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


def _initial_maximum(rows: Tensor, weight: Tensor) -> Tensor:
    """Return the lowest finite number for each row [N].

    With −inf instead, a first tile of only −inf would add NaN, not 0.
    """
    dtype = sum_dtype(torch.promote_types(rows.dtype, weight.dtype))
    return rows.new_full((rows.shape[0],), torch.finfo(dtype).min, dtype=dtype)


def _temperature_per_row(temperature: float | Tensor, labels: Tensor, like: Tensor) -> Tensor | None:
    """Return one temperature per row [N], or None if the temperature is the number 1."""
    temperatures = torch.as_tensor(temperature, device=like.device).detach()
    if temperatures.ndim and temperatures.shape != labels.shape:
        raise ValueError(
            f"temperature {tuple(temperatures.shape)} must be a number or have the shape of labels "
            f"{tuple(labels.shape)}"
        )
    if not bool(((temperatures > 0) & temperatures.isfinite()).all()):
        raise ValueError(
            f"temperature must be finite and above 0, not {float(temperatures.min())}: greedy choice has no "
            "log-probability. Use 1 for targets and the sampling temperature for thoughts"
        )
    if not temperatures.ndim and float(temperatures) == 1:
        return None
    return temperatures.to(sum_dtype(like.dtype)).expand(labels.shape).reshape(-1)
