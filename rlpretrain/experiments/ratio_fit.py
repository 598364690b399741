"""The critical-mixture-ratio law fitted to the losses of a grid (arXiv 2407.17467), with intervals.

At the end of the runs the change of a group's loss is a power law of the ratio R of domain text,
alpha R^s + beta (the paper's section 5.1). The critical ratio is the largest R whose predicted general loss
does not exceed the base model's by more than the tolerance (definitions 1 and 3).

Seeds are few, so they are not resampled: each draw adds to the means a multivariate t deviate with the
covariance of the seeds, which gives Student's interval for anything linear. Held-out rows are resampled whole
in each draw. All ratios of a draw share rows and deviate, since all runs of a seed share their documents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from rlpretrain.experiments.power_laws import Bounds, PowerLaw, fit_power_law
from rlpretrain.experiments.ratio_losses import GridLosses, GroupLosses

PARAMETERS = 3
BOUNDS = {"general": Bounds(0.2, 12.0), "domain": Bounds(-4.0, 4.0)}
"""Exponents of the ratio. The general loss is finite without domain text, so its exponent is above 0."""
OVER_TOKENS = Bounds(-4.0, 4.0)
TAILS = (0.025, 0.975)


@dataclass(frozen=True, slots=True)
class RatioLaw:
    """One group's law at the end of the runs."""

    used: np.ndarray
    """[M] whether a ratio is fitted: its runs read text of the group."""
    mean: np.ndarray
    """[M] change of the loss, mean over seeds."""
    seed_error: np.ndarray
    """[M] standard error of that mean over seeds; NaN with one seed."""
    draws: np.ndarray
    """[draws, M] means that the data might have had."""
    law: PowerLaw | None
    """None with fewer ratios than parameters, or a mean that is not finite."""
    drawn_laws: PowerLaw | None
    residual: float
    """Root of the squared distances of the means from the law over their degrees of freedom; else NaN."""
    left_out: np.ndarray
    """[M] error of the prediction of each ratio by the law of the others; NaN where not fitted."""
    left_out_laws: dict[int, PowerLaw]
    """The law without each ratio, by its place."""


def fit_ratio_law(losses: GridLosses, group: str, rng: np.random.Generator, draws: int) -> RatioLaw:
    """The law of a group with what is needed to judge it."""
    data, bounds = losses.groups[group], BOUNDS[group]
    used = losses.ratios < 1 if group == "general" else losses.ratios > 0
    changes = data.changes
    mean, count = changes.mean(0), len(changes)
    error = changes.std(0, ddof=1) / np.sqrt(count) if count > 1 else np.full(len(mean), np.nan)
    drawn = draw_means(data, rng, draws)
    x = losses.ratios[used]
    left_out, left_out_laws = np.full(len(mean), np.nan), {}
    if used.sum() < PARAMETERS or not np.isfinite(mean[used]).all():
        return RatioLaw(used, mean, error, drawn, None, None, np.nan, left_out, left_out_laws)
    law = fit_power_law(x, mean[used], bounds)
    freedom = used.sum() - PARAMETERS
    squares = ((law.at(x) - mean[used]) ** 2).sum()
    residual = float(np.sqrt(squares / freedom)) if freedom else np.nan
    if freedom:
        for place in np.flatnonzero(used):
            others = used & (np.arange(len(used)) != place)
            without = fit_power_law(losses.ratios[others], mean[others], bounds)
            left_out_laws[int(place)] = without
            left_out[place] = float(without.at(losses.ratios[[place]])[0] - mean[place])
    drawn_laws = fit_power_law(x, drawn[:, used], bounds)
    return RatioLaw(used, mean, error, drawn, law, drawn_laws, residual, left_out, left_out_laws)


def draw_means(data: GroupLosses, rng: np.random.Generator, draws: int) -> np.ndarray:
    """[draws, M] means over seeds that other held-out rows and other seeds might have given.

    With one seed only the rows vary.
    """
    changes = data.resampled(rng, draws)
    mean, seeds = changes.mean(1), changes.shape[1]
    if seeds == 1:
        return mean
    apart = changes - mean[:, None]
    normal = np.einsum("ds,dsm->dm", rng.standard_normal((draws, seeds)), apart) / np.sqrt(
        seeds * (seeds - 1)
    )
    scale = np.sqrt(rng.chisquare(seeds - 1, draws) / (seeds - 1))  # makes normal deviates Student's
    return mean + normal / scale[:, None]


@dataclass(frozen=True, slots=True)
class CriticalRatio:
    """The critical ratio of the fitted general loss, from 0 to 1."""

    value: float
    """inf: no ratio up to 1 is over the tolerance; -inf: every ratio is, 0 too."""
    interval: tuple[float, float]
    """95%; 0 and 1 are its widest ends."""
    outside: tuple[float, float]
    """Shares of the draws whose value is below and above the fitted ratios."""
    left_out: dict[float, float]
    """The value that follows without one of the ratios."""


def find_critical(general: RatioLaw, ratios: np.ndarray, tolerance: float) -> CriticalRatio | None:
    """The critical ratio; None without a law."""
    if general.law is None or general.drawn_laws is None:
        return None
    value = beyond(float(general.law.largest_below(tolerance)))
    drawn, fitted = general.drawn_laws.largest_below(tolerance), ratios[general.used]
    low, high = np.quantile(np.clip(drawn, 0, 1), TAILS)
    outside = (float((drawn < fitted.min()).mean()), float((drawn > fitted.max()).mean()))
    left_out = {
        float(ratios[place]): beyond(float(law.largest_below(tolerance)))
        for place, law in general.left_out_laws.items()
    }
    return CriticalRatio(value, (float(low), float(high)), outside, left_out)


def beyond(value: float) -> float:
    """A critical ratio, with infinity for what lies outside of 0 to 1."""
    return np.inf if value > 1 else -np.inf if value < 0 else value


def band(law: RatioLaw, ratios: np.ndarray) -> dict[str, list[float]]:
    """The law and its 95% interval at some ratios, for the plot."""
    assert law.law is not None and law.drawn_laws is not None, "asked of a fitted law only"
    low, high = np.quantile(law.drawn_laws.at(ratios), TAILS, axis=0)
    rows = {"ratios": ratios, "mean": law.law.at(ratios), "low": low, "high": high}
    return {name: values.tolist() for name, values in rows.items()}


def critical_over_tokens(losses: GridLosses, tolerance: float) -> dict[str, Any]:
    """The critical ratio at each token count of the curves, and the power law through them (equation 8).

    Only ratios within the grid are listed and fitted; the law needs four.
    """
    used = losses.ratios < 1
    if used.sum() < PARAMETERS:
        return {"tokens": [], "ratios": []}
    curves = losses.groups["general"].curves.mean(0)[used]  # [M, K]
    laws = fit_power_law(losses.ratios[used], curves[:, 1:].T, BOUNDS["general"])
    critical = laws.largest_below(tolerance)
    inside = (critical >= losses.ratios.min()) & (critical <= losses.ratios.max())
    tokens, critical = losses.curve_tokens[1:][inside], critical[inside]
    found: dict[str, Any] = {"tokens": tokens.tolist(), "ratios": critical.tolist()}
    if len(tokens) > PARAMETERS:
        budget = losses.curve_tokens[-1]
        law = fit_power_law(tokens / budget, critical, OVER_TOKENS)
        left = law.at(tokens / budget) - critical
        found["law"] = {
            "alpha": float(law.alpha),
            "exponent": float(law.exponent),
            "beta": float(law.beta),
            "unit": float(budget),
            "residual": float(np.sqrt((left * left).sum() / (len(tokens) - PARAMETERS))),
        }
    return found
