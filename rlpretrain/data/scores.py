"""Scores of texts: which segment of its text each token belongs to, and the segment's score.

A column gives one number for the whole text, or segments `[[start, end, score], ...]` in characters. Segments
ascend and do not overlap. Text between two segments belongs to the second, text before the first one to the
first, and text after the last one to the last. So every character, and every token, is in one segment.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from rlpretrain.types import Document

SEGMENT_STARTS = "segment_starts"
"""Key of `Document.meta`: the index of the first token of each segment that has tokens, ascending, from 0."""

MOST_BUCKETS = 64


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of a text that has one score; it ends before character `end`."""

    end: int
    score: float


def read_segments(value: Any, text: str) -> list[Segment]:
    """The segments of a text from the cell of its score column.

    Raises ValueError that says what is wrong with the cell.
    """
    if _is_number(value):
        return [Segment(len(text), float(value))]
    if not isinstance(value, list | tuple) or not value:
        raise ValueError(f"{_shown(value)} is neither a finite number nor [[start, end, score], ...]")
    segments, last_end = [], 0
    for item in value:
        if not isinstance(item, list | tuple) or len(item) != 3 or not all(map(_is_number, item)):
            raise ValueError(f"the segment {_shown(item)} is not [start, end, score] with finite numbers")
        start, end, score = item
        if start != int(start) or end != int(end):
            raise ValueError(f"the segment {_shown(item)} does not start and end at whole characters")
        if not last_end <= start < end <= len(text):
            raise ValueError(
                f"the segment {_shown(item)} overlaps the one before it (which ends at {last_end}), is "
                f"empty, or reaches beyond the text of {len(text)} characters"
            )
        segments.append(Segment(int(end), float(score)))
        last_end = int(end)
    return segments


def segment_of_tokens(
    text: str, offsets: Sequence[tuple[int, int]], segments: Sequence[Segment]
) -> list[int]:
    """The index of each token's segment: that of its first character which is not white space.

    Tokenizers disagree about whether the white space before a word belongs to its token; that character is
    the same for all. A token of white space alone counts from its first character. A token without characters
    (a special token) belongs to the segment of the token before it.
    """
    ends = [segment.end for segment in segments]
    indices, last = [], 0
    for start, end in offsets:
        if end > start:
            part = text[start:end]
            blank = len(part) - len(part.lstrip())
            first = start + (blank if blank < len(part) else 0)
            last = max(last, min(bisect_right(ends, first), len(ends) - 1))
        indices.append(last)
    return indices


def starts_of(values: Sequence[Any]) -> list[int]:
    """The indices at which a run of equal values begins; the first is 0."""
    return [0, *(i for i, (a, b) in enumerate(pairwise(values), 1) if a != b)]


def segments_of(document: Document) -> tuple[list[int], list[float]]:
    """The first token of each segment of a document with scores, and its score.

    Where a source of one's own sets scores alone, a segment is a run of equal ones.
    """
    assert document.scores is not None, "it has scores"
    starts = (document.meta or {}).get(SEGMENT_STARTS) or starts_of(document.scores)
    return starts, [document.scores[start] for start in starts]


def spread(starts: Sequence[int], scores: Sequence[float], size: int) -> tuple[float, ...]:
    """The score of each of `size` tokens, from those of the segments that begin at `starts`."""
    return tuple(np.repeat(scores, np.diff([*starts, size])).tolist())


class PlaceMeans:
    """The mean of a number of tokens by their place in a document, in buckets: see `bucket_of`."""

    def __init__(self) -> None:
        self.sums, self.counts = np.zeros(MOST_BUCKETS), np.zeros(MOST_BUCKETS)

    def add(self, numbers: np.ndarray) -> None:
        """Add the numbers of a document's tokens, but for the first, which nothing predicts."""
        buckets = bucket_of(np.arange(1, len(numbers)), MOST_BUCKETS)
        np.add.at(self.sums, buckets, numbers[1:])
        np.add.at(self.counts, buckets, 1)

    def values(self) -> np.ndarray:
        """The means, up to the last bucket that was seen."""
        last = int(self.counts.nonzero()[0].max(initial=0))
        return self.sums[: last + 1] / np.maximum(self.counts[: last + 1], 1)


def bucket_of(places: np.ndarray, buckets: int) -> np.ndarray:
    """floor(log2(place)) of places from 1 on, at most the last of `buckets`."""
    return np.minimum(np.frexp(places)[1] - 1, buckets - 1)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"
