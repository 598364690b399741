"""The blocks of 128 × 128 pairs of tokens in which a tree attends, without a matrix of all pairs.

`create_block_mask` of torch evaluates every pair: 4 GiB for 64k tokens. In a tree, each token attends to a
few intervals of the flat sequence: a piece of each segment on its path, and its own segment up to itself. So
the pairs of a block are counted from the ends of these intervals. Time grows with the intervals of all
tokens, memory with the number of blocks. Legend: N tokens of the tree, M tokens with padding, S segments.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from rlpretrain.tree import Tree

BLOCK = 128
"""Tokens of a block's side; FlexAttention's default, of which its kernels' tiles are parts."""


class Walk(NamedTuple):
    """A depth-first walk through the tokens of a tree: who attends to whom, from two numbers for each token.

    Token i attends to token j if i is in the subtree of j: `enter[j] <= enter[i] < leave[j]`.
    """

    enter: np.ndarray
    """[N] when the walk enters a token."""
    leave: np.ndarray
    """[N] when it has left the token's subtree."""


def walk(tree: Tree) -> Walk:
    """Walk through a tree: each segment at once, then what branches off it, the last branch first."""
    starts, lengths = np.asarray(tree.starts, dtype=np.int64), np.asarray(tree.lengths, dtype=np.int64)
    ends = [
        path[-1][1] if path else 0 for path in tree.paths
    ]  # the first token after that to which s belongs
    parents = np.searchsorted(starts, np.asarray(ends, dtype=np.int64) - 1, side="right") - 1  # -1: a root
    below = lengths.copy()  # tokens of a segment and of all that branches off it
    for s in reversed(range(len(starts))):  # a segment stands behind its parent
        if parents[s] >= 0:
            below[parents[s]] += below[s]
    enters = np.zeros(len(starts), np.int64)
    free = lengths.copy()  # where the next segment that branches off s is entered, from where s is
    root = 0
    for s in sorted(range(len(starts)), key=lambda s: (int(parents[s]), -ends[s])):
        if parents[s] < 0:
            enters[s], root = root, root + below[s]
        else:
            enters[s] = enters[parents[s]] + free[parents[s]]
            free[parents[s]] += below[s]
    segment = np.repeat(np.arange(len(starts)), lengths)
    branches = np.zeros(tree.size + 1, np.int64)  # tokens that branch off at a token
    inner = parents >= 0
    np.add.at(branches, np.asarray(ends, dtype=np.int64)[inner] - 1, below[inner])
    from_here = np.cumsum(branches[::-1])[::-1]  # at a token or behind it
    enter = np.arange(tree.size) - starts[segment] + enters[segment]
    leave = (enters + lengths)[segment] + from_here[:-1] - from_here[(starts + lengths)[segment]]
    return Walk(enter, leave)


class Blocks(NamedTuple):
    """Which blocks a kernel computes, and for which of them it needs no mask. Both [M / 128, M / 128]."""

    partial: np.ndarray
    """Some pairs of the block attend."""
    full: np.ndarray
    """All do."""


def blocks_of(tree: Tree, padded: int, window: int | None) -> Blocks:
    """The blocks of a tree; arguments as in `count_pairs`."""
    pairs = count_pairs(tree, padded, window)
    return Blocks((pairs > 0) & (pairs < BLOCK**2), pairs == BLOCK**2)


def count_pairs(tree: Tree, padded: int, window: int | None) -> np.ndarray:
    """For each block [M / 128, M / 128], the number of its pairs of which the first attends to the second.

    The tree is padded to `padded` tokens, a multiple of 128; padding attends to itself. With a `window`, a
    token attends only to itself and to the `window - 1` tokens before it on its path.
    """
    count = padded // BLOCK
    whole = np.zeros((count, count + 1), np.int64)  # by block: ends of intervals minus starts
    part = np.zeros((count, count + 1), np.int64)  # the same, weighted by the tokens of the block before them
    for queries, low, high in _intervals(tree, padded, window):
        rows = queries // BLOCK
        for ends, sign in ((high, 1), (low, -1)):
            columns, inside = np.divmod(ends, BLOCK)
            np.add.at(whole, (rows, columns), sign)
            np.add.at(part, (rows, columns), sign * inside)
    # [0, end) has all tokens of the blocks before that of its end, and the first few of that block
    behind = np.cumsum(whole[:, ::-1], axis=1)[:, ::-1]
    return BLOCK * behind[:, 1:] + part[:, :-1]


def _intervals(
    tree: Tree, padded: int, window: int | None
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Tokens and the intervals [low, high) to which they attend, one for each segment on a token's path."""
    starts, lengths = np.asarray(tree.starts, dtype=np.int64), np.asarray(tree.lengths, dtype=np.int64)
    tokens = np.arange(padded)
    low = np.concatenate([np.repeat(starts, lengths), tokens[tree.size :]])
    if window:
        low = np.maximum(low, tokens - window + 1)
    yield tokens, low, tokens + 1
    for fork in tree.forks:
        queries = tokens[fork.start : fork.stop]
        for start, stop in fork.path:
            low = np.full(len(queries), start)
            if window:
                nearest = tree.positions[queries] - window + 1 - tree.positions[start]
                low = start + np.clip(nearest, 0, stop - start)
            yield queries, low, np.full(len(queries), stop)
