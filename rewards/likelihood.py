"""Token log-probabilities straight from hidden states, without ever holding [tokens, vocabulary].

Shapes: N rows (tokens), H hidden, V vocabulary; ``...`` any leading dimensions, whose product is N.

The logits exist one tile at a time: ``chunk_size`` vocabulary entries by a block of rows. The forward pass
keeps a running log-sum-exp per row. The backward pass computes each tile again, turns it into probabilities
in place and adds its share to the gradients. That takes four matrix products where stored logits need three,
and the memory of one tile.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rewards.logit_tiles import (
    check_head,
    column_slices,
    exponentiate,
    logit_tile,
    row_slices,
    select,
    sum_dtype,
)
from rewards.tiled_logps import IGNORE, TiledLogps, initial_maximum, temperature_per_row


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
    temperatures = temperature_per_row(temperature, labels.shape, hidden)
    counted = row_labels != IGNORE
    outside = counted & ((row_labels < 0) | (row_labels >= lm_head_weight.shape[0]))
    if bool(outside.any()):
        raise ValueError(
            f"label {int(row_labels[outside][0])} is outside the vocabulary of lm_head_weight "
            f"{tuple(lm_head_weight.shape)}; mark rows that do not count with {IGNORE}"
        )
    if bool(counted.all()):
        logps = TiledLogps.apply(rows, lm_head_weight, bias, row_labels, temperatures, options)
        return logps.view(labels.shape)
    index = counted.nonzero().squeeze(1)
    logps = TiledLogps.apply(
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
    temperatures = temperature_per_row(temperature, labels.shape, logits)
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
    maximum = initial_maximum(rows, lm_head_weight)
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
