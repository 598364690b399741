"""Power laws with an offset, y = alpha x^s + beta, and with two terms, fitted by least squares.

Such a law is linear in all but its exponents. For given exponents the best coefficients are known in closed
form, and what remains is a search over one exponent or two (variable projection, Golub and Pereyra 1973). It
is done on a grid over all allowed exponents that is refined around its best point. So there are no starting
values, no local minimum between grid points far apart is missed, and thousands of resampled data sets are
fitted at once.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

POINTS = 241
"""Exponents of the first grid for one term."""
PAIR_POINTS = 41
"""Exponents of the first grid for each of two terms."""
ROUNDS = 6
"""Times that the grid for one term is refined; each makes it five times as fine."""
PAIR_ROUNDS = 80
"""Moves or refinements of the window for two terms."""
CLOSEST = 0.05
"""Smallest distance of the exponents of two terms."""
NO_ZERO = 1e-6
"""Smallest absolute exponent: alpha is infinite at 0, where the law becomes a logarithm."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """Allowed exponents."""

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class PowerLaw:
    """y = offset + slope (u^s - 1)/s with u = x / unit, which is alpha x^s + beta, well conditioned at s = 0.

    All fields but the last two may be arrays [...], a law for each of several data sets.
    """

    exponent: np.ndarray
    slope: np.ndarray
    """dy/du at x = unit."""
    offset: np.ndarray
    """y at x = unit."""
    bounds: Bounds
    unit: float
    """The largest fitted x: of an x that is small everywhere, x^s would be lost beside 1."""

    @property
    def alpha(self) -> np.ndarray:
        """The coefficient of x^s."""
        return self.slope / self.exponent * self.unit**-self.exponent

    @property
    def beta(self) -> np.ndarray:
        """The constant: y at x = 0 where the exponent is above 0."""
        return self.offset - self.slope / self.exponent

    @property
    def at_bound(self) -> np.ndarray:
        """Whether the exponent is the smallest or largest allowed one."""
        margin = 1e-3 * (self.bounds.high - self.bounds.low)
        return (self.exponent < self.bounds.low + margin) | (self.exponent > self.bounds.high - margin)

    def at(self, x: np.ndarray) -> np.ndarray:
        """y [..., n] at x [n]."""
        basis = power_basis(np.asarray(x, float) / self.unit, self.exponent[..., None])
        return self.offset[..., None] + self.slope[..., None] * basis

    def largest_below(self, limit: float) -> np.ndarray:
        """The largest x of at least 0 at which y does not exceed `limit`, of a law with exponent above 0.

        inf where y never does for large x; -inf where it does at all x, or falls and is above it at x = 1.
        """
        rises = self.slope > 0
        with np.errstate(divide="ignore", invalid="ignore"):
            power = 1 + self.exponent * (limit - self.offset) / self.slope
            crossing = np.where(power >= 0, self.unit * np.maximum(power, 0) ** (1 / self.exponent), -np.inf)
        return np.where(rises, crossing, np.where(self.at(np.ones(1))[..., 0] <= limit, np.inf, -np.inf))


@dataclass(frozen=True, slots=True)
class TwoPowers:
    """y = offset + the sum of slope_k (x^s_k - 1)/s_k over two terms."""

    exponents: np.ndarray
    slopes: np.ndarray
    offset: float

    def at(self, x: np.ndarray) -> np.ndarray:
        """y [n] at x [n]."""
        return self.offset + self.slopes @ power_basis(x, self.exponents[:, None])


def power_basis(x: np.ndarray, exponent: np.ndarray) -> np.ndarray:
    """(x^s - 1)/s, which tends to log x for s to 0; x may be 0 where s is above 0."""
    exponent = np.where(np.abs(exponent) < NO_ZERO, NO_ZERO, exponent)
    with np.errstate(divide="ignore"):
        return np.expm1(exponent * np.log(np.asarray(x, float))) / exponent


def fit_power_law(x: np.ndarray, y: np.ndarray, bounds: Bounds) -> PowerLaw:
    """The law of least squares through y [..., n] at x [n], for each of the leading dimensions.

    Needs three different x, none below 0 and one above. x = 0 needs `bounds.low` above 0.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    unit = float(x.max())
    x = x / unit
    centred = y - y.mean(-1, keepdims=True)
    exponents = np.linspace(bounds.low, bounds.high, POINTS)
    basis = power_basis(x, exponents[:, None])
    basis = basis - basis.mean(-1, keepdims=True)
    basis = basis / np.linalg.norm(basis, axis=-1, keepdims=True)
    best = exponents[np.abs(centred @ basis.T).argmax(-1)]  # the largest part explained
    step = exponents[1] - exponents[0]
    for _ in range(ROUNDS):
        near = np.clip(best[..., None] + step * np.linspace(-1, 1, 11), bounds.low, bounds.high)
        errors = np.stack([_error(x, centred, near[..., k]) for k in range(near.shape[-1])], -1)
        best = np.take_along_axis(near, errors.argmin(-1)[..., None], -1)[..., 0]
        step /= 5
    best = np.where(np.abs(best) < NO_ZERO, NO_ZERO, best)
    slope, centre = _slope(x, centred, best)
    return PowerLaw(best, slope, y.mean(-1) - slope * centre, bounds, unit)


def _slope(x: np.ndarray, centred: np.ndarray, exponent: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The slope of least squares for given exponents [...], and the mean of the basis."""
    basis = power_basis(x, exponent[..., None])
    centre = basis.mean(-1)
    basis = basis - centre[..., None]
    return (basis * centred).sum(-1) / (basis * basis).sum(-1), centre


def _error(x: np.ndarray, centred: np.ndarray, exponent: np.ndarray) -> np.ndarray:
    """The sum of squares that the best law with these exponents leaves."""
    slope, centre = _slope(x, centred, exponent)
    left = centred - slope[..., None] * (power_basis(x, exponent[..., None]) - centre[..., None])
    return (left * left).sum(-1)


def fit_two_powers(x: np.ndarray, y: np.ndarray, bounds: Bounds) -> TwoPowers:
    """The law with two terms of least squares through y [n] at x [n], all above 0; needs six points."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    exponents = np.linspace(bounds.low, bounds.high, PAIR_POINTS)
    pairs = np.array(list(itertools.combinations(exponents, 2)))
    step = exponents[1] - exponents[0]
    best = pairs[_pair_errors(x, y, pairs).argmin()]
    shifts = np.array(list(itertools.product(np.linspace(-1, 1, 7), repeat=2)))
    for _ in range(PAIR_ROUNDS):  # the error has long, curved valleys: shrink only once the centre is best
        pairs = np.clip(best + step * shifts, bounds.low, bounds.high)
        pairs = pairs[np.diff(pairs, axis=1)[:, 0] > CLOSEST]  # equal exponents are one term
        nearest = pairs[_pair_errors(x, y, pairs).argmin()]
        step = step / 2 if np.abs(nearest - best).max() < 0.9 * step else step
        best = nearest
    design = _design(x, best[None])[0]
    offset, *slopes = np.linalg.lstsq(design, y, rcond=None)[0]
    return TwoPowers(best, np.array(slopes), float(offset))


def _design(x: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """[pairs, points, 3]: the constant and both terms."""
    basis = power_basis(x[None, :, None], pairs[:, None, :])
    return np.concatenate([np.ones((*basis.shape[:2], 1)), basis], -1)


def _pair_errors(x: np.ndarray, y: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """The sum of squares that the best law with each pair of exponents leaves."""
    q = np.linalg.qr(_design(x, pairs))[0]
    left = y - (q @ (np.swapaxes(q, 1, 2) @ y)[..., None])[..., 0]
    return (left * left).sum(-1)
