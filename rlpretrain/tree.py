"""Prefix trees: rows of tokens in which a shared prefix is stored once.

Rows share a prefix if they are thoughts at one position, positions of one document, or prompts with the same
beginning. Every row is a path from the root, and its tokens attend only to tokens on that path. This is exact
for any model whose tokens interact only in attention. Legend: N tokens of the tree, S segments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

Piece = tuple[int, int]
"""Tokens [start, stop) of the flat sequence."""


class Reach(NamedTuple):
    """Which tokens attend to which, by segments; dense and block masks are computed from it.

    Token i attends to token j if `place[j] < limit[segment[i], segment[j]]` and j is not deeper than i.
    """

    segment: np.ndarray
    """[N] each token's segment."""
    place: np.ndarray
    """[N] each token's index in its segment."""
    limit: np.ndarray
    """[S, S] how many tokens of the second segment are on the path of the first."""


@dataclass(frozen=True)
class Fork:
    """Segments that branch off at one place."""

    start: int
    stop: int
    """Their tokens are [start, stop)."""
    path: tuple[Piece, ...]
    """The tokens before them, to which all of them attend."""
    first: int
    last: int
    """The segments are [first, last)."""


@dataclass(frozen=True, eq=False)
class Tree:
    """Segments in a flat sequence, one after the other; segments with the same path are neighbours.

    The tokens of a segment attend to the tokens of its path, and to their own segment up to themselves.
    """

    lengths: tuple[int, ...]  # [S]
    paths: tuple[tuple[Piece, ...], ...]  # [S]: the pieces before a segment, starting at the root

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """[S] the first token of each segment."""
        return (0, *np.cumsum(self.lengths).tolist()[:-1])

    @property
    def size(self) -> int:
        """N, the number of tokens."""
        return sum(self.lengths)

    @cached_property
    def positions(self) -> np.ndarray:
        """[N] each token's position id: the number of tokens before it on its path."""
        parts = []
        for length, path in zip(self.lengths, self.paths, strict=True):
            depth = sum(stop - start for start, stop in path)
            parts.append(np.arange(length) + depth)
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    @cached_property
    def deepest(self) -> int:
        """The length of the longest row in tokens."""
        return int(self.positions.max(initial=-1)) + 1

    @cached_property
    def forks(self) -> tuple[Fork, ...]:
        """The places where segments branch off, in order."""
        forks: list[Fork] = []
        for s, (start, length, path) in enumerate(zip(self.starts, self.lengths, self.paths, strict=True)):
            if path and forks and forks[-1].path == path:
                forks[-1] = Fork(forks[-1].start, start + length, path, forks[-1].first, s + 1)
            elif path:
                forks.append(Fork(start, start + length, path, s, s + 1))
        return tuple(forks)

    @cached_property
    def bins(self) -> tuple[np.ndarray, ...]:
        """The segments in batches of similar length: token indices [n, longest], padded with -1."""
        by_length = sorted(range(len(self.lengths)), key=lambda s: self.lengths[s])
        batches: list[list[int]] = []
        for s in by_length:
            if batches and self.lengths[s] <= 1.5 * self.lengths[batches[-1][0]] + 8:
                batches[-1].append(s)
            else:
                batches.append([s])
        bins = []
        for batch in batches:
            indices = np.full((len(batch), self.lengths[batch[-1]]), -1)
            for i, s in enumerate(batch):
                indices[i, : self.lengths[s]] = self.starts[s] + np.arange(self.lengths[s])
            bins.append(indices)
        return tuple(bins)

    @cached_property
    def reach(self) -> Reach:
        """Which tokens attend to which."""
        count = len(self.lengths)
        segment = np.repeat(np.arange(count), self.lengths)
        place = np.arange(self.size) - np.asarray(self.starts, dtype=np.int64)[segment]
        limit = np.zeros((count, count), np.int64)
        for s, path in enumerate(self.paths):
            limit[s, s] = self.lengths[s]
            for start, stop in path:
                limit[s, segment[start]] = stop - self.starts[segment[start]]
        return Reach(segment, place, limit)

    def dense(self) -> np.ndarray:
        """Return the attention mask [N, N], True where the first attends to the second. For small trees."""
        segment, place, limit = self.reach
        on_path = place[None] < limit[segment][:, segment]
        return on_path & (self.positions[None] <= self.positions[:, None])


class _Segment:
    """A segment of a tree that is being built."""

    def __init__(self, ids: np.ndarray, parent: _Segment | None, parent_tokens: int):
        self.ids = ids
        self.first_id = int(ids[0])
        self.parent = parent
        self.parent_tokens = parent_tokens  # after which the segment branches off
        self.children: dict[int, list[_Segment]] = {}  # by their `parent_tokens`
        self.start = 0

    def path(self) -> tuple[Piece, ...]:
        """Return the pieces before the segment, starting at the root."""
        if self.parent is None:
            return ()
        parent_path = self.parent.path()
        if not self.parent_tokens:
            return parent_path
        return (*parent_path, (self.parent.start, self.parent.start + self.parent_tokens))


_Walk = list[tuple[_Segment, int]]
"""The segments of a row, and how many tokens of each belong to it."""


class GrownTree(NamedTuple):
    """A tree with its tokens and the rows from which it was built."""

    ids: np.ndarray
    """[N] token ids."""
    tree: Tree
    rows: list[np.ndarray]
    """For each row the indices of its tokens in the tree."""


def grow(rows: Sequence[Sequence[int]], least: int = 8) -> GrownTree:
    """Build the tree of some rows.

    Rows are added in their order, so a document must come before the rows that branch off it. A shared prefix
    of fewer than `least` tokens is not merged, since each piece of a path costs a matrix product.
    """
    roots: list[_Segment] = []
    walks = [_add_row(roots, np.asarray(row, dtype=np.int64), least) for row in rows]
    segments = _place_segments(roots)
    tree = Tree(tuple(len(s.ids) for s in segments), tuple(s.path() for s in segments))
    ids = np.concatenate([s.ids for s in segments]) if segments else np.zeros(0, np.int64)
    indices = []
    for walk in walks:
        pieces = [np.arange(segment.start, segment.start + count) for segment, count in walk]
        indices.append(np.concatenate(pieces or [np.zeros(0, np.int64)]))
    return GrownTree(ids, tree, indices)


def _add_row(roots: list[_Segment], ids: np.ndarray, least: int) -> _Walk:
    """Follow the segments that share a prefix with a row; add what remains of the row as a new segment."""
    walk: _Walk = []
    siblings = roots
    while len(ids):
        shared = [_shared_with(segment, ids) for segment in siblings]
        best = int(np.argmax(shared)) if shared else -1
        if best < 0 or shared[best] < min(least, len(ids)):
            parent, parent_tokens = walk[-1] if walk else (None, 0)
            segment = _Segment(ids, parent, parent_tokens)
            siblings.append(segment)
            walk.append((segment, len(ids)))
            break
        segment, count = siblings[best], shared[best]
        walk.append((segment, count))
        ids = ids[count:]
        if len(ids):
            siblings = segment.children.setdefault(count, [])
    return walk


def _shared_with(segment: _Segment, ids: np.ndarray) -> int:
    """Return the length of the prefix that a segment shares with `ids`."""
    if segment.first_id != ids[0]:  # the usual case, and cheaper than a comparison of arrays
        return 0
    return shared_prefix_length(segment.ids, ids)


def _place_segments(roots: list[_Segment]) -> list[_Segment]:
    """Set the starts of all segments and return them in order; those with the same path are neighbours."""
    ordered: list[_Segment] = []
    start = 0
    families = [roots]
    for siblings in families:  # grows in the loop
        for segment in siblings:
            segment.start = start
            start += len(segment.ids)
            ordered.append(segment)
        for segment in siblings:
            families += [segment.children[count] for count in sorted(segment.children)]
    return ordered


def shared_prefix_length(a: np.ndarray, b: np.ndarray) -> int:
    """Return the number of tokens with which both sequences begin."""
    n = min(len(a), len(b))
    differ = a[:n] != b[:n]
    return int(differ.argmax()) if differ.any() else n
