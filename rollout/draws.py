"""Drawing tokens: a counter-based generator, truncated distributions, one uniform number per row.

R rows, V vocabulary, L steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rollout.types import SamplingParams

_GAMMA = 0x9E3779B97F4A7C15  # SplitMix64: the odd step between two states of a stream
_MIX = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_WORD = (1 << 64) - 1
_SEED = (1 << 63) - 1


def thought_seed(seed: int, index: int) -> int:
    """The seed of thought `index` of a prompt with seed `seed`: a non-negative 63-bit number.

    Thought 0 keeps the prompt's seed (modulo 2**63), so that `n=1, seeds=[thought.seed]` draws a stored
    thought again. The others get a hash of both numbers.

    >>> thought_seed(7, 0), thought_seed(thought_seed(7, 3), 0) == thought_seed(7, 3)
    (7, True)
    """
    seed &= _SEED
    if index == 0:
        return seed
    word = (seed ^ (index * _MIX[1])) & _WORD
    for shift, factor in ((30, _MIX[0]), (27, _MIX[1])):
        word = ((word ^ (word >> shift)) * factor) & _WORD
    return (word ^ (word >> 31)) & _SEED


def uniforms(seeds: Sequence[int], steps: int, device: torch.device | str = "cpu") -> Tensor:
    """Uniform numbers in (0, 1), [R, steps] float64: row r is the SplitMix64 stream of `seeds[r]`.

    Number t of a row is a hash of (seed, t) alone, in integer arithmetic and one exact division. So every
    device and every batch gives the same bits.
    """
    start = torch.tensor([seed & _SEED for seed in seeds], dtype=torch.int64, device=device)
    counter = torch.arange(1, steps + 1, dtype=torch.int64, device=device)
    word = start[:, None] + counter * _signed(_GAMMA)
    for shift, factor in ((30, _MIX[0]), (27, _MIX[1])):
        word = (word ^ _shift_right(word, shift)) * _signed(factor)
    word = _shift_right(word ^ _shift_right(word, 31), 11)  # the upper 53 bits, what a float64 holds exactly
    return (word.double() + 0.5) * 2.0**-53


def truncated_logps(logits: Tensor, params: SamplingParams) -> Tensor:
    """Log-probabilities (nats, float32, [R, V]) to draw from: banned ids, temperature, top-k, then top-p.

    Top-k keeps every token that ties with the k-th; top-p keeps the smallest set of most likely tokens
    whose probability reaches it, at least one. Tokens outside are -inf and the rest are normalised again.
    At temperature 0 only banned ids are removed, and the log-probabilities of temperature 1 are returned: a
    greedy choice has no distribution of its own.
    """
    logits = _without_banned(logits.float(), params)
    if params.temperature not in (0.0, 1.0):
        logits = logits / params.temperature
    if params.temperature > 0 and 0 < params.top_k < logits.shape[-1]:
        least = logits.topk(params.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if params.temperature > 0 and params.top_p < 1:
        ordered, order = logits.sort(descending=True, stable=True)
        probs = ordered.softmax(-1)
        outside = probs.cumsum(-1) - probs >= params.top_p
        outside[:, 0] = False
        logits = logits.masked_fill(outside.scatter(1, order, outside), -torch.inf)
    return logits.log_softmax(-1)


def draw(
    logits: Tensor, uniform: Tensor, params: SamplingParams, greedy: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Draw one token per row of `logits` [R, V] with `uniform` [R]: token ids [R], log-probabilities [R].

    Inverts the cumulative distribution, summed in float64: the token is the first at which the sum reaches
    `uniform`, and never one of probability 0. Temperature 0 takes the most likely token, of equal ones the
    lower id; rows of `greedy` [R] are drawn as at temperature 0. NaN logits give NaN log-probabilities; the
    caller checks for them once at the end.
    """
    logps = truncated_logps(logits, params)
    if params.temperature == 0:
        token = logps.argmax(-1, keepdim=True)
    else:
        mass = logps.exp().cumsum(-1, dtype=torch.float64)
        token = torch.searchsorted(mass, uniform[:, None] * mass[:, -1:]).clamp_(max=logits.shape[-1] - 1)
    if greedy is not None and params.temperature > 0:
        plain = _without_banned(logits[greedy].float(), params).log_softmax(-1)
        token[greedy], logps[greedy] = plain.argmax(-1, keepdim=True), plain
    return token[:, 0], logps.gather(1, token)[:, 0]


def _without_banned(logits: Tensor, params: SamplingParams) -> Tensor:
    """Logits [R, V] with -inf at the banned ids."""
    if not params.banned_ids:
        return logits
    banned = torch.tensor(params.banned_ids, device=logits.device)
    return logits.index_fill(-1, banned, -torch.inf)


def _shift_right(word: Tensor, bits: int) -> Tensor:
    """Shift 64-bit words right, filling with zeros (torch's own shift fills with the sign)."""
    return (word >> bits) & ((1 << (64 - bits)) - 1)


def _signed(word: int) -> int:
    """The int64 with the same 64 bits."""
    return word - (1 << 64) if word >> 63 else word
