"""Means of measured numbers with 95% intervals that cover: whole source rows are resampled, and few seeds get
a t interval.

The pieces of a long text, and the positions in them, are not independent: what is drawn again is the row of
the data that they come from. Two or three seeds are too few to resample; their part of the interval is
Student's t over the seeds' own means.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import lru_cache
from statistics import NormalDist

import numpy as np

FEWEST = 8
"""Rows below which resampling them gives too narrow an interval; there it is Student's t."""
LEVEL = 0.95


def row_of(document_id: str) -> str:
    """The source row of a document: the id of a piece is "<row>.<piece>".

    >>> row_of("12.3"), row_of("12"), row_of("ntp 4.0"), row_of("chapter 1.2b")
    ('12', '12', 'ntp 4', 'chapter 1.2b')
    """
    return re.sub(r"\.\d+$", "", document_id)


def interval(
    values: np.ndarray,
    weights: np.ndarray | None = None,
    *,
    rows: Sequence[str] | None = None,
    seed: int = 0,
    draws: int = 2000,
) -> tuple[float, list[float]]:
    """Weighted mean of values [seeds, positions] and its 95% interval; the positions are the same for every
    seed.

    `rows` names each position's source row (None: each is a row of its own). NaN counts nowhere, as does
    weight 0.

    One seed: a percentile bootstrap over whole rows, a little wider than the plain one (Hesterberg 2015,
    expanded percentiles), or Student's t below `FEWEST` rows. It does not know how another seed would have
    come out. Several seeds: the half-width is the root of the squares of two, t over the seeds' means and t
    over the rows (whose error is that of a ratio of sums over rows). Where an interval would need a second
    row it is NaN.
    """
    values = np.atleast_2d(np.asarray(values, float))
    weights = (
        np.ones_like(values) if weights is None else np.broadcast_to(np.asarray(weights, float), values.shape)
    )
    weights = np.where(np.isfinite(values), weights, 0.0)
    if not weights.sum() > 0:
        return math.nan, [math.nan, math.nan]
    top, bottom = _sums_over_rows(np.nan_to_num(values) * weights, rows), _sums_over_rows(weights, rows)
    used = bottom.sum(0) > 0
    top, bottom = top[:, used], bottom[:, used]
    mean, count = float(top.sum() / bottom.sum()), top.shape[1]
    if count < 2:
        return mean, [math.nan, math.nan]
    if len(values) == 1 and count >= FEWEST:
        return mean, _resampled(top[0], bottom[0], seed, draws)
    error = ((top - mean * bottom).sum(0) / bottom.sum()) @ ((top - mean * bottom).sum(0) / bottom.sum())
    half = student(count - 1) ** 2 * error * count / (count - 1)
    own = points(values, weights)
    own = own[np.isfinite(own)]
    if len(own) > 1:
        half += student(len(own) - 1) ** 2 * own.var(ddof=1) / len(own)
    return mean, [mean - math.sqrt(half), mean + math.sqrt(half)]


def points(values: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """The weighted mean of each seed [seeds]; NaN where nothing counts."""
    values = np.atleast_2d(np.asarray(values, float))
    weights = (
        np.ones_like(values) if weights is None else np.broadcast_to(np.asarray(weights, float), values.shape)
    )
    weights = np.where(np.isfinite(values), weights, 0.0)
    total = weights.sum(1)
    return np.divide(
        (np.nan_to_num(values) * weights).sum(1), total, out=np.full(len(values), math.nan), where=total > 0
    )


@lru_cache(maxsize=256)
def student(freedom: int) -> float:
    """The number of standard errors on either side that 95% lie within, with so many degrees of freedom.

    >>> [round(student(n), 3) for n in (1, 2, 10, 1000)]
    [12.706, 4.303, 2.228, 1.962]
    """
    angle = np.linspace(
        0.0, math.pi / 2, 200_001
    )  # t is sqrt(freedom) tan(angle), and the density of the angle is this
    density = np.cos(angle) ** (freedom - 1)
    below = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return math.sqrt(freedom) * math.tan(float(np.interp(LEVEL, below / below[-1], angle)))


def _sums_over_rows(values: np.ndarray, rows: Sequence[str] | None) -> np.ndarray:
    """[seeds, positions] summed over the positions of each row: [seeds, rows]."""
    if rows is None:
        return values
    if len(rows) != values.shape[1]:
        raise ValueError(f"{len(rows)} source rows are named for {values.shape[1]} positions")
    _, place = np.unique(np.asarray(rows, str), return_inverse=True)
    out = np.zeros((len(values), int(place.max()) + 1))
    for k, part in enumerate(values):
        out[k] = np.bincount(place, part, minlength=out.shape[1])
    return out


def _resampled(top: np.ndarray, bottom: np.ndarray, seed: int, draws: int) -> list[float]:
    """Percentiles of the mean over rows drawn with replacement."""
    rng, count = np.random.default_rng(seed), len(top)
    drawn = rng.integers(count, size=(draws, count)) + count * np.arange(draws)[:, None]
    times = np.bincount(drawn.ravel(), minlength=draws * count).reshape(draws, count).astype(float)
    weight = times @ bottom
    means = (times @ top)[weight > 0] / weight[weight > 0]
    tail = NormalDist().cdf(-math.sqrt(count / (count - 1)) * student(count - 1))
    low, high = np.quantile(means, [tail, 1 - tail])
    return [float(low), float(high)]
