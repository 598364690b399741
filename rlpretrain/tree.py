"""Rows of tokens that share their heads, as one prefix tree: what they share is there once.

A document and the thoughts that leave it, several positions of a document, prompts with a common head: every
row is a path from the root, and sees the tokens on its path and no others. Exact for any model whose tokens
meet only in attention. Legend: N tokens of the tree, S segments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

Piece = tuple[int, int]
"""Tokens [start, stop) of the flat sequence."""


@dataclass(frozen=True)
class Fork:
    """Segments [first, last) that leave the tree at one place: tokens [start, stop), all of which see
    `path`.
    """

    start: int
    stop: int
    path: tuple[Piece, ...]
    first: int
    last: int


@dataclass(frozen=True, eq=False)
class Tree:
    """Segments, laid one behind the other: each sees the tokens of its path, and itself up to the token at
    hand.

    Segments with the same path are neighbours.
    """

    lengths: tuple[int, ...]  # [S]
    paths: tuple[tuple[Piece, ...], ...]  # [S]: the pieces before a segment, from the root on

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """[S] where each segment begins."""
        return (0, *np.cumsum(self.lengths).tolist()[:-1])

    @property
    def size(self) -> int:
        """N."""
        return sum(self.lengths)

    @cached_property
    def positions(self) -> np.ndarray:
        """[N] how many tokens stand before each on its path: its position id."""
        parts = [
            np.arange(n) + sum(b - a for a, b in path)
            for n, path in zip(self.lengths, self.paths, strict=True)
        ]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    @cached_property
    def deepest(self) -> int:
        """Tokens of the longest row."""
        return int(self.positions.max(initial=-1)) + 1

    @cached_property
    def forks(self) -> tuple[Fork, ...]:
        """The places where segments leave others, in order."""
        found: list[Fork] = []
        for s, (start, length, path) in enumerate(zip(self.starts, self.lengths, self.paths, strict=True)):
            if path and found and found[-1].path == path:
                found[-1] = Fork(found[-1].start, start + length, path, found[-1].first, s + 1)
            elif path:
                found.append(Fork(start, start + length, path, s, s + 1))
        return tuple(found)

    @cached_property
    def bins(self) -> tuple[np.ndarray, ...]:
        """The segments in batches of similar length: for each batch the tokens [n, longest], -1 where a
        segment is shorter.
        """
        order = sorted(range(len(self.lengths)), key=lambda s: self.lengths[s])
        batches: list[list[int]] = []
        for s in order:
            if batches and self.lengths[s] <= 1.5 * self.lengths[batches[-1][0]] + 8:
                batches[-1].append(s)
            else:
                batches.append([s])
        out = []
        for batch in batches:
            at = np.full((len(batch), self.lengths[batch[-1]]), -1)
            for i, s in enumerate(batch):
                at[i, : self.lengths[s]] = self.starts[s] + np.arange(self.lengths[s])
            out.append(at)
        return tuple(out)

    @cached_property
    def reach(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(segment [N], place in it [N], reach [S, S]): token i sees j if j's place is below `reach[segment
        i, segment j]`, and j is no deeper than i. What dense and block masks are made of.
        """
        count = len(self.lengths)
        segment = np.repeat(np.arange(count), self.lengths)
        place = np.arange(self.size) - np.asarray(self.starts, dtype=np.int64)[segment]
        reach = np.zeros((count, count), np.int64)
        for s, path in enumerate(self.paths):
            reach[s, s] = self.lengths[s]
            for a, b in path:
                reach[s, segment[a]] = b - self.starts[segment[a]]
        return segment, place, reach

    def dense(self) -> np.ndarray:
        """[N, N] bool: who sees whom. For tests and small trees."""
        segment, place, reach = self.reach
        return (place[None] < reach[segment][:, segment]) & (self.positions[None] <= self.positions[:, None])


class _Segment:
    def __init__(self, ids: np.ndarray, parent: _Segment | None, at: int):
        self.ids, self.parent, self.at, self.first = ids, parent, at, int(ids[0])
        self.leaving: dict[int, list[_Segment]] = {}  # by the place where they leave
        self.start = 0

    def path(self) -> tuple[Piece, ...]:
        if self.parent is None:
            return ()
        above = self.parent.path()
        return (*above, (self.parent.start, self.parent.start + self.at)) if self.at else above


def grow(rows: Sequence[Sequence[int]], least: int = 8) -> tuple[np.ndarray, Tree, list[np.ndarray]]:
    """(token ids [N], the tree, for each row where in the tree its tokens are).

    Rows are laid in their order, so documents, which others leave, come first. `least`: heads shorter than
    this are not shared, since each piece of a path costs a product of its own.
    """
    roots: list[_Segment] = []
    walks: list[list[tuple[_Segment, int]]] = []  # for each row its segments, and how many tokens of each
    for row in rows:
        left, walk, parent, near = np.asarray(row, dtype=np.int64), [], None, roots
        while True:
            first = (
                int(left[0]) if len(left) else -1
            )  # most siblings share nothing: asked before arrays are compared
            shared = [common(segment.ids, left) if segment.first == first else 0 for segment in near]
            best = int(np.argmax(shared)) if shared else -1
            if best < 0 or shared[best] < min(least, len(left)):
                break
            parent, n = near[best], shared[best]
            walk.append((parent, n))
            left = left[n:]
            near = parent.leaving.setdefault(n, []) if len(left) else []
            if not len(left):
                break
        if len(left):
            segment = _Segment(left, parent, walk[-1][1] if walk else 0)
            near.append(segment)
            walk.append((segment, len(left)))
        walks.append(walk)
    order: list[_Segment] = []
    level = [roots]
    for siblings in level:  # those that leave at one place stand together
        for segment in siblings:
            segment.start = order[-1].start + len(order[-1].ids) if order else 0
            order.append(segment)
        level += [
            segment.leaving[n] for segment in siblings for n in sorted(segment.leaving) if segment.leaving[n]
        ]
    tree = Tree(tuple(len(s.ids) for s in order), tuple(s.path() for s in order))
    ids = np.concatenate([s.ids for s in order]) if order else np.zeros(0, np.int64)
    where = [
        np.concatenate([np.arange(s.start, s.start + n) for s, n in walk] or [np.zeros(0, np.int64)])
        for walk in walks
    ]
    return ids, tree, where


def common(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens two sequences begin with in common."""
    n = min(len(a), len(b))
    differ = a[:n] != b[:n]
    return int(differ.argmax()) if differ.any() else n
