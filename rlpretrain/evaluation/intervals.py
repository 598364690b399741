"""Means with 95% intervals that cover: source rows are resampled whole, and few seeds get a t interval.

The pieces of a long text, and the positions in them, are not independent, so the resampled unit is the row of
the data that they come from. Two or three seeds are too few to resample; they contribute Student's t over the
seeds' means.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import lru_cache
from statistics import NormalDist

import numpy as np

FEWEST = 8
"""With fewer rows a resampled interval is too narrow; they get Student's t."""
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
    """Weighted mean of values [seeds, positions] and its 95% interval.

    All seeds have the same positions. `rows` names each position's source row (None: each position is a row).
    Values of NaN and of weight 0 are ignored.

    One seed: a percentile bootstrap over whole rows with expanded percentiles (Hesterberg 2015), or Student's
    t with fewer than `FEWEST` rows. It does not include the variation between seeds. Several seeds: the
    squared half-width is the sum of two squares, t over the seeds' means and t over the rows; the error over
    rows is that of a ratio of sums. With a single row the interval is NaN.
    """
    values = np.atleast_2d(np.asarray(values, float))
    weights = _finite_weights(values, weights)
    if not weights.sum() > 0:
        return math.nan, [math.nan, math.nan]
    top, bottom = _sums_over_rows(np.nan_to_num(values) * weights, rows), _sums_over_rows(weights, rows)
    used = bottom.sum(0) > 0
    top, bottom = top[:, used], bottom[:, used]
    mean, count = float(top.sum() / bottom.sum()), top.shape[1]
    if count < 2:
        return mean, [math.nan, math.nan]
    if len(values) == 1 and count >= FEWEST:
        return mean, _bootstrap(top[0], bottom[0], seed, draws)
    residuals = (top - mean * bottom).sum(0) / bottom.sum()
    squared = student(count - 1) ** 2 * (residuals @ residuals) * count / (count - 1)
    seed_means = points(values, weights)
    seed_means = seed_means[np.isfinite(seed_means)]
    if len(seed_means) > 1:
        squared += student(len(seed_means) - 1) ** 2 * seed_means.var(ddof=1) / len(seed_means)
    return mean, [mean - math.sqrt(squared), mean + math.sqrt(squared)]


def points(values: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """The weighted mean of each seed [seeds]; NaN if it has no value."""
    values = np.atleast_2d(np.asarray(values, float))
    weights = _finite_weights(values, weights)
    sums, total = (np.nan_to_num(values) * weights).sum(1), weights.sum(1)
    return np.divide(sums, total, out=np.full(len(values), math.nan), where=total > 0)


def _finite_weights(values: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    """The weights in the shape of `values`, by default 1; 0 for values that are not finite."""
    if weights is None:
        return np.isfinite(values).astype(float)
    return np.where(np.isfinite(values), np.broadcast_to(np.asarray(weights, float), values.shape), 0.0)


@lru_cache(maxsize=256)
def student(freedom: int) -> float:
    """Half-width in standard errors of a 95% interval, by degrees of freedom.

    >>> [round(student(n), 3) for n in (1, 2, 10, 1000)]
    [12.706, 4.303, 2.228, 1.962]
    """
    # with t = sqrt(freedom) tan(angle), the density of the angle is cos(angle) ** (freedom - 1)
    angle = np.linspace(0.0, math.pi / 2, 200_001)
    density = np.cos(angle) ** (freedom - 1)
    cumulative = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return math.sqrt(freedom) * math.tan(float(np.interp(LEVEL, cumulative / cumulative[-1], angle)))


def _sums_over_rows(values: np.ndarray, rows: Sequence[str] | None) -> np.ndarray:
    """[seeds, positions] summed over the positions of each row: [seeds, rows]."""
    if rows is None:
        return values
    if len(rows) != values.shape[1]:
        raise ValueError(f"{len(rows)} source rows are named for {values.shape[1]} positions")
    names, row_of_position = np.unique(np.asarray(rows, str), return_inverse=True)
    sums = [np.bincount(row_of_position, of_seed, minlength=len(names)) for of_seed in values]
    return np.array(sums)


def _bootstrap(top: np.ndarray, bottom: np.ndarray, seed: int, draws: int) -> list[float]:
    """Percentiles of the mean over rows drawn with replacement."""
    rng, count = np.random.default_rng(seed), len(top)
    drawn = rng.integers(count, size=(draws, count)) + count * np.arange(draws)[:, None]
    times = np.bincount(drawn.ravel(), minlength=draws * count).reshape(draws, count).astype(float)
    weight = times @ bottom  # `times` is how often each row is in a draw
    means = (times @ top)[weight > 0] / weight[weight > 0]
    tail = NormalDist().cdf(-math.sqrt(count / (count - 1)) * student(count - 1))
    low, high = np.quantile(means, [tail, 1 - tail])
    return [float(low), float(high)]
