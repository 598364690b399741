"""Token log-probabilities straight from hidden states, without ever holding [tokens, vocabulary].

Shapes: N rows (tokens), H hidden, V vocabulary; ``...`` any leading dimensions, whose product is N.

The logits exist one tile at a time: ``chunk_size`` vocabulary entries by a block of rows. The forward pass
keeps a running log-sum-exp per row; the backward pass makes each tile again, turns it into probabilities in
place and adds its share to the gradients. That is four matrix products where stored logits need three, and
the memory of one tile.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE = -100


def token_logps(
    hidden: Float[Tensor, "*N H"],
    lm_head_weight: Float[Tensor, "V H"],
    labels: Int[Tensor, "*N"],
    *,
    bias: Float[Tensor, " V"] | None = None,
    temperature: float | Float[Tensor, "*N"] = 1.0,
    chunk_size: int = 2048,
    softcap: float | None = None,
    scale: float = 1.0,
) -> Float[Tensor, "*N"]:
    """Return log p(label | hidden) in nats for each row, in memory independent of rows × vocabulary.

    With z = scale · (hidden · weightᵀ + bias), capped to softcap · tanh(z / softcap) where the model does so,
    the result is z[label] / temperature − logsumexp(z / temperature). Gradients flow to hidden, weight and
    bias, each computed only if it is asked for; there is no second derivative.

    Precision: the products run in the inputs' common dtype, like the model's own head; all after them, and
    the sums that gather gradients over tiles, in fp32 (float64 for float64 inputs). Autocast is switched off
    inside. The result is fp32 (or float64). NaN or +inf in a row's logits makes that row NaN; a logit of −inf
    has probability 0, as in log_softmax.

    Args:
        labels: token ids in [0, V); −100 marks a row that does not count: its result is 0, its gradient is
        zero and it
            is never computed, so that it may hold anything.
        temperature: divides the final logits, one number or one per row; 1 for targets, the sampling
        temperature for
            thoughts. Finite and above 0: greedy choice has no log-probability.
        chunk_size: vocabulary entries per tile. Any size gives the same numbers up to rounding.
        softcap: Gemma 2's final logit soft-capping (arXiv 2408.00118, §2); None for none.
        scale: multiplies the logits: Cohere's `logit_scale`, 1 / Granite's `logits_scaling`.

    Raises:
        ValueError: shapes that do not fit, a label outside the vocabulary, a temperature, softcap or
        chunk_size of 0 or
            less. No rows at all is fine: the result is empty, and its backward gives zero gradients.

    Source: the running log-sum-exp is algorithm 3 of Milakov & Gimelshein (arXiv 1805.02867); logits made
    again in the backward pass as in Wijmans et al. (arXiv 2411.09009).

    >>> hidden, weight = torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 0.0], [0.0, 5.0]])
    >>> token_logps(hidden, weight, torch.tensor([0]))     # logits 2 and 0
    tensor([-0.1269])
    """
    head = _check(hidden, lm_head_weight, bias, softcap, scale, chunk_size)
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"labels {tuple(labels.shape)} must have the shape of hidden {tuple(hidden.shape)} without "
            "its last dimension: one label per row"
        )
    rows, flat = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    heat = _temperatures(temperature, labels, hidden)
    counted = flat != IGNORE
    wrong = counted & ((flat < 0) | (flat >= lm_head_weight.shape[0]))
    if bool(wrong.any()):
        raise ValueError(
            f"label {int(flat[wrong][0])} is outside the vocabulary of lm_head_weight "
            f"{tuple(lm_head_weight.shape)}; mark rows that do not count with {IGNORE}"
        )
    if bool(counted.all()):
        return _TokenLogps.apply(rows, lm_head_weight, bias, flat, heat, head).view(labels.shape)
    index = counted.nonzero().squeeze(1)
    some = _TokenLogps.apply(rows[index], lm_head_weight, bias, flat[index], _part(heat, index), head)
    return some.new_zeros(flat.shape).index_put((index,), some).view(labels.shape)


def token_logps_from_logits(
    logits: Float[Tensor, "*N V"], labels: Int[Tensor, "*N"], temperature: float | Float[Tensor, "*N"] = 1.0
) -> Float[Tensor, "*N"]:
    """Return log p(label) in nats from logits that exist already: the plain version that `token_logps` must
    equal.

    fp32 (float64 for float64 logits). −100 labels give 0 with zero gradient; NaN and inf as in
    `torch.log_softmax`. Errors are those of `token_logps`, except that a label outside the vocabulary is
    torch's own.

    >>> token_logps_from_logits(torch.tensor([[2.0, 0.0]]), torch.tensor([0]))
    tensor([-0.1269])
    """
    heat = _temperatures(temperature, labels, logits)
    scores = logits.to(_wide(logits.dtype))
    if heat is not None:
        scores = scores / heat.view(*labels.shape, 1)
    counted = labels != IGNORE
    picked = scores.log_softmax(-1).gather(-1, labels.where(counted, 0).unsqueeze(-1)).squeeze(-1)
    return picked.where(counted, 0.0)


@torch.no_grad()
def row_entropies(
    hidden: Float[Tensor, "*N H"],
    lm_head_weight: Float[Tensor, "V H"],
    *,
    bias: Float[Tensor, " V"] | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    chunk_size: int = 2048,
) -> Float[Tensor, "*N"]:
    """Return the entropy in nats of each row's next-token distribution, tile by tile and without gradient.

    Between 0 and ln V; positions to think at are chosen by it. Arguments, errors, NaN and inf are those of
    `token_logps`; the temperature is 1. Source: with weights w = exp(z − max z), entropy is ln Σw − Σ w ln w
    / Σw.

    >>> row_entropies(torch.zeros(1, 3), torch.ones(8, 3))     # uniform over eight tokens: ln 8
    tensor([2.0794])
    """
    head = _check(hidden, lm_head_weight, bias, softcap, scale, chunk_size)
    rows = hidden.reshape(-1, hidden.shape[-1])
    peak, total, moment = _running(rows, lm_head_weight)
    with torch.autocast(rows.device.type, enabled=False):
        for v in _slices(lm_head_weight.shape[0], head.chunk):
            for r in _slices(rows.shape[0], _row_block(rows)):
                tile = _logits(rows[r], lm_head_weight[v], _part(bias, v), None, head)
                new = torch.maximum(peak[r], tile.amax(1))
                shift, weights = peak[r] - new, tile.sub_(new.unsqueeze(1)).exp_()
                moment[r] = shift.exp() * (moment[r] + total[r] * shift) - torch.special.entr(weights).sum(1)
                total[r] = shift.exp() * total[r] + weights.sum(1)
                peak[r] = new
    return (total.log() - moment / total).view(hidden.shape[:-1])


class _Head(NamedTuple):
    """How a product hidden @ weight.T becomes logits, softcap(scale · (product + bias)), and the width of
    a tile.
    """

    scale: float
    softcap: float | None
    chunk: int


class _TokenLogps(torch.autograd.Function):
    """Forward: running log-sum-exp over tiles. Backward: d logp / dz = (onehot − softmax(z / T)) / T, tile
    by tile.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        heat: Tensor | None,
        head: _Head,
    ) -> Tensor:
        peak, total, picked = _running(hidden, weight)
        with torch.autocast(hidden.device.type, enabled=False):
            for v in _slices(weight.shape[0], head.chunk):
                for r in _slices(hidden.shape[0], _row_block(hidden)):
                    tile = _logits(hidden[r], weight[v], _part(bias, v), _part(heat, r), head)
                    inside, column = _find(labels[r], v)
                    picked[r] = torch.where(inside, tile.gather(1, column).squeeze(1), picked[r])
                    new = torch.maximum(peak[r], tile.amax(1))
                    total[r] = total[r] * (peak[r] - new).exp_() + tile.sub_(new.unsqueeze(1)).exp_().sum(1)
                    peak[r] = new
        normaliser = peak + total.log()
        # The weight is saved as the very parameter it is: ZeRO-3 empties its storage after the forward pass
        # and refills it before the backward one, which a view or a copy would not notice.
        ctx.save_for_backward(hidden, weight, bias, labels, heat, normaliser)
        ctx.head = head
        return picked - normaliser

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        hidden, weight, bias, labels, heat, normaliser = ctx.saved_tensors
        head, common, wide = ctx.head, torch.promote_types(hidden.dtype, weight.dtype), normaliser.dtype
        for_hidden, for_weight, for_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.zeros_like(hidden, dtype=wide) if for_hidden else None
        grad_weight = torch.zeros_like(weight) if for_weight else None
        grad_bias = torch.zeros_like(bias, dtype=wide) if for_bias else None
        # What is one factor per row goes onto the [N, H] side, not onto the tiles; so does the minus that
        # turns the tiles' softmax − onehot round.
        factor = -head.scale * grad.to(wide) / (1.0 if heat is None else heat)
        scaled = (hidden.to(wide) * factor.unsqueeze(1)).to(common)
        with torch.autocast(hidden.device.type, enabled=False):
            for v in _slices(weight.shape[0], head.chunk):
                columns = weight[v].to(common)
                # Sums over row blocks are taken in fp32; one tile of them at a time, so no fp32 copy of a
                # bf16 weight.
                weight_sum = None if grad_weight is None else grad_weight[v].to(wide)
                for r in _slices(hidden.shape[0], _row_block(hidden)):
                    tile = _logits(hidden[r], columns, _part(bias, v), _part(heat, r), head)
                    slope = (
                        None if head.softcap is None else _softcap_slope(tile, _part(heat, r), head.softcap)
                    )
                    tile.sub_(normaliser[r].unsqueeze(1)).exp_()
                    inside, column = _find(labels[r], v)
                    tile.scatter_add_(1, column, -inside.unsqueeze(1).to(wide))
                    if slope is not None:
                        tile.mul_(slope)
                    if grad_bias is not None:
                        grad_bias[v].addmv_(tile.T, factor[r])
                    tile = tile.to(common)
                    if grad_hidden is not None:
                        _add_product(grad_hidden[r], tile, columns)
                    if weight_sum is not None:
                        _add_product(weight_sum, tile.T, scaled[r])
                if grad_weight is not None and weight_sum is not None and grad_weight.dtype != wide:
                    grad_weight[v] = weight_sum  # otherwise the two are the same memory
        if grad_hidden is not None:
            grad_hidden = grad_hidden.mul_(factor.unsqueeze(1)).to(hidden.dtype)
        return (
            grad_hidden,
            grad_weight,
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
            None,
        )


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, heat: Tensor | None, head: _Head) -> Tensor:
    """One tile of final logits over temperature, in fp32 and in memory of its own, to be worked on in
    place.
    """
    common = torch.promote_types(hidden.dtype, weight.dtype)
    tile = (hidden.to(common) @ weight.to(common).T).to(_wide(common))
    if bias is not None:
        tile.add_(bias)
    if head.scale != 1:
        tile.mul_(head.scale)
    if head.softcap is not None:
        tile.div_(head.softcap).tanh_().mul_(head.softcap)
    return tile if heat is None else tile.div_(heat.unsqueeze(1))


def _softcap_slope(tile: Tensor, heat: Tensor | None, softcap: float) -> Tensor:
    """d capped / d uncapped = 1 − (capped / softcap)², from a tile of capped logits over temperature."""
    return 1 - (tile / softcap if heat is None else tile * (heat / softcap).unsqueeze(1)).square_()


def _add_product(into: Tensor, left: Tensor, right: Tensor) -> None:
    """into += left @ right, added in the type of `into`."""
    if into.dtype == left.dtype:
        into.addmm_(left, right)
    else:
        into.add_(left @ right)


def _find(labels: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Which labels lie among these columns [N], and where [N, 1] (some column that exists, for those that
    do not).
    """
    inside = (labels >= columns.start) & (labels < columns.stop)
    return inside, (labels - columns.start).clamp(0, columns.stop - columns.start - 1).unsqueeze(1)


def _running(rows: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A running maximum and two sums [N]. The maximum starts finite: a tile of only −inf then adds 0, not
    NaN.
    """
    wide = _wide(torch.promote_types(rows.dtype, weight.dtype))
    peak = rows.new_full((rows.shape[0],), torch.finfo(wide).min, dtype=wide)
    return peak, torch.zeros_like(peak), torch.zeros_like(peak)


def _slices(total: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


def _part(values: Tensor | None, where: slice | Tensor) -> Tensor | None:
    return None if values is None else values[where]


def _row_block(rows: Tensor) -> int:
    """Rows per tile: a CPU wants tiles that stay in its cache, an accelerator wants few large ones."""
    return 1024 if rows.device.type == "cpu" else 8192


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _temperatures(temperature: float | Tensor, labels: Tensor, like: Tensor) -> Tensor | None:
    """One temperature per row [N], or None where it is 1 everywhere."""
    heat = torch.as_tensor(temperature, device=like.device).detach()
    if heat.ndim and heat.shape != labels.shape:
        raise ValueError(
            f"temperature {tuple(heat.shape)} must be a number or have the shape of labels "
            f"{tuple(labels.shape)}"
        )
    if not bool(((heat > 0) & heat.isfinite()).all()):
        raise ValueError(
            f"temperature must be finite and above 0, not {float(heat.min())}: greedy choice has no log-"
            "probability. Score targets at 1 and thoughts at the temperature they were sampled with"
        )
    if not heat.ndim and float(heat) == 1:
        return None
    return heat.to(_wide(like.dtype)).expand(labels.shape).reshape(-1)


def _check(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, scale: float, chunk: int
) -> _Head:
    if weight.ndim != 2 or hidden.ndim < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} must end in the second dimension of lm_head_weight "
            f"{tuple(weight.shape)}: pass [..., H] and [V, H]"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias {tuple(bias.shape)} must have one entry per row of lm_head_weight {tuple(weight.shape)}"
        )
    if (softcap is not None and not softcap > 0) or chunk < 1:
        raise ValueError(f"softcap {softcap} must be None or above 0, chunk_size {chunk} at least 1")
    return _Head(float(scale), softcap, chunk)
