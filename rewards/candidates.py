"""Log-probabilities of several tokens at each place, and the likeliest tokens, read tile by tile.

A loss with soft targets, −Σ_j q_j log p(j), needs log p of K tokens in each row, with gradient. A teacher
gives its K likeliest tokens. Neither holds [rows, vocabulary]; see `rewards.likelihood` for the method.
Shapes: N rows, K labels of a row, H hidden, V vocabulary; ``*N`` any leading dimensions.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rewards.logit_tiles import check_head, column_slices, exponentiate, logit_tile, row_slices, select
from rewards.tiled_logps import EVERY_TOKEN, IGNORE, TiledLogps, initial_maximum, temperature_per_row


def candidate_logps(
    hidden: Float[Tensor, "*N H"],
    lm_head_weight: Float[Tensor, "V H"],
    labels: Int[Tensor, "*N K"],
    *,
    bias: Float[Tensor, " V"] | None = None,
    temperature: float | Float[Tensor, "*N"] = 1.0,
    chunk_size: int | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
) -> Float[Tensor, "*N K"]:
    """Return log p(label | hidden) in nats of K labels in each row, in memory of one tile and [N, K].

    All labels of a row share its matrix product, so K labels cost little more than one. A token may stand in
    a row more than once. Gradients, precision, NaN and inf are those of `token_logps`; so are all arguments
    but `labels`.

    Args:
        labels: token ids in [0, V). −1 (EVERY_TOKEN) stands for the whole vocabulary: its value is the mean
            of log p over all tokens, so that label smoothing is exact. −100 (IGNORE) does not count: its
            value is 0, without gradient, and a row of nothing else is not computed.

    Raises:
        ValueError: as `token_logps`, and for labels without a last dimension of at least 1.

    >>> hidden, weight = torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 0.0], [0.0, 5.0]])
    >>> candidate_logps(hidden, weight, torch.tensor([[0, 1, -1]]))     # logits 2 and 0, and their mean
    tensor([[-0.1269, -2.1269, -1.1269]])
    """
    options = check_head(hidden, lm_head_weight, bias, softcap, scale, chunk_size)
    if labels.shape[:-1] != hidden.shape[:-1] or not labels.ndim or not labels.shape[-1]:
        raise ValueError(
            f"labels {tuple(labels.shape)} must have the shape of hidden {tuple(hidden.shape)} with a number "
            "of labels, at least 1, in place of its last dimension"
        )
    rows, row_labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1, labels.shape[-1])
    temperatures = temperature_per_row(temperature, labels.shape[:-1], hidden)
    counted = row_labels != IGNORE
    outside = counted & ((row_labels < EVERY_TOKEN) | (row_labels >= lm_head_weight.shape[0]))
    if bool(outside.any()):
        raise ValueError(
            f"label {int(row_labels[outside][0])} is outside the vocabulary of lm_head_weight "
            f"{tuple(lm_head_weight.shape)}; mark labels that do not count with {IGNORE}"
        )
    used = counted.any(1)
    if bool(used.all()):
        head = (lm_head_weight, bias)
        logps = TiledLogps.apply(rows, *head, row_labels.where(counted, 0), temperatures, options)
    else:
        index = used.nonzero().squeeze(1)
        safe = row_labels.where(counted, 0)[index]
        head = (lm_head_weight, bias)
        logps = TiledLogps.apply(rows[index], *head, safe, select(temperatures, index), options)
        logps = logps.new_zeros(row_labels.shape).index_put((index,), logps)
    return logps.where(counted, 0.0).view(labels.shape)


@torch.no_grad()
def top_logps(
    hidden: Float[Tensor, "*N H"],
    lm_head_weight: Float[Tensor, "V H"],
    count: int,
    *,
    bias: Float[Tensor, " V"] | None = None,
    temperature: float | Float[Tensor, "*N"] = 1.0,
    chunk_size: int | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
) -> tuple[Int[Tensor, "*N K"], Float[Tensor, "*N K"]]:
    """Return the `count` likeliest tokens of each row, likeliest first, and their log p in nats.

    K is `count`, or V if that is smaller. The log-probs are those of the whole vocabulary, so their mass is
    below 1 unless K = V. No gradient. Arguments, errors, NaN and inf are those of `token_logps`.

    >>> ids, logps = top_logps(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 5.0], [2.0, 0.0]]), 1)
    >>> ids, logps
    (tensor([[1]]), tensor([[-0.1269]]))
    """
    options = check_head(hidden, lm_head_weight, bias, softcap, scale, chunk_size)
    if count < 1:
        raise ValueError(f"count must be at least 1, not {count}")
    rows = hidden.reshape(-1, hidden.shape[-1])
    temperatures = temperature_per_row(temperature, hidden.shape[:-1], hidden)
    maximum = initial_maximum(rows, lm_head_weight)
    total = torch.zeros_like(maximum)
    kept = min(count, lm_head_weight.shape[0])
    logits = maximum.new_full((len(rows), kept), -torch.inf)
    ids = torch.zeros(logits.shape, dtype=torch.int64, device=rows.device)
    with torch.autocast(rows.device.type, enabled=False):
        for v in column_slices(lm_head_weight, options.chunk_size):
            for r in row_slices(rows):
                head = (select(bias, v), select(temperatures, r))
                tile = logit_tile(rows[r], lm_head_weight[v], *head, options)
                best = tile.topk(min(kept, tile.shape[1]), dim=1)
                both = torch.cat([logits[r], best.values], 1), torch.cat([ids[r], best.indices + v.start], 1)
                logits[r], order = both[0].topk(kept, dim=1)
                ids[r] = both[1].gather(1, order)
                log_rescale = exponentiate(tile, maximum[r])
                total[r] = total[r] * log_rescale.exp_() + tile.sum(1)
    logps = logits - (maximum + total.log()).unsqueeze(1)
    shape = (*hidden.shape[:-1], kept)
    return ids.view(shape), logps.view(shape)
