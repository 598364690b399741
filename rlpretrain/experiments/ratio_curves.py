"""Losses over tokens: the laws of arXiv 2407.17467, equation 6, and the stability gap (arXiv 2406.14833)."""

from __future__ import annotations

from typing import Any

import numpy as np

from rlpretrain.evaluation.intervals import student
from rlpretrain.experiments.power_laws import Bounds, fit_power_law, fit_two_powers
from rlpretrain.experiments.ratio_losses import GridLosses

OVER_TOKENS = Bounds(-4.0, 4.0)
DOMAIN_PARAMETERS, GENERAL_PARAMETERS = 3, 5


def curve_laws(losses: GridLosses) -> list[dict[str, Any]]:
    """The laws over tokens of each ratio, through the means over seeds without the start.

    Domain: a power law. General: two terms, since that loss may rise and fall again; `turns_at` is the token
    count of its maximum, after which it falls, and null if it still rises at the end. A law with fewer points
    than parameters and one is null. Tokens are in units of `unit`.
    """
    unit = float(losses.curve_tokens[-1])
    x = losses.curve_tokens[1:] / unit
    rows = []
    for place, ratio in enumerate(losses.ratios):
        general = losses.groups["general"].curves[:, place, 1:].mean(0)
        domain = losses.groups["domain"].curves[:, place, 1:].mean(0)
        row: dict[str, Any] = {"ratio": float(ratio), "unit": unit, "general": None, "domain": None}
        if len(x) > DOMAIN_PARAMETERS:
            law = fit_power_law(x, domain, OVER_TOKENS)
            row["domain"] = {
                "alpha": float(law.alpha),
                "exponent": float(law.exponent),
                "beta": float(law.beta),
                "residual": _residual(law.at(x) - domain, DOMAIN_PARAMETERS),
            }
        if len(x) > GENERAL_PARAMETERS:
            law = fit_two_powers(x, general, OVER_TOKENS)
            fine = np.linspace(x[0], 1, 1000)
            top = int(law.at(fine).argmax())
            row["general"] = {
                "alphas": (law.slopes / law.exponents).tolist(),
                "exponents": law.exponents.tolist(),
                "beta": float(law.offset - (law.slopes / law.exponents).sum()),
                "residual": _residual(law.at(x) - general, GENERAL_PARAMETERS),
                "turns_at": None if top == len(fine) - 1 else float(fine[top] * unit),
            }
        rows.append(row)
    return rows


def _residual(left: np.ndarray, parameters: int) -> float:
    return float(np.sqrt((left * left).sum() / (len(left) - parameters)))


def stability_gaps(losses: GridLosses, tolerance: float) -> list[dict[str, Any]]:
    """The transient rise of the general loss at each ratio, from the means over seeds.

    `peak` is the highest change from the base model at a measured token count, with its 95% interval over
    seeds (null with one seed), and `gap` what of it is gone at the end: the peak minus the larger of start
    and end. `recovered` is the token count from which the loss stays at or below the base model's, in
    straight lines between measurements, and `recovered_to_tolerance` the same with the tolerance; null: not
    by the end. A peak between two measurements is missed: `spacing` is their distance in tokens.
    """
    tokens, rows = losses.curve_tokens, []
    for place, ratio in enumerate(losses.ratios):
        curves = losses.groups["general"].curves[:, place]
        mean = curves.mean(0)
        top = int(mean.argmax())
        rows.append(
            {
                "ratio": float(ratio),
                "start": float(losses.groups["general"].base.mean()),
                "peak": _with_interval(curves[:, top]),
                "peak_at": float(tokens[top]),
                "end": _with_interval(curves[:, -1]),
                "gap": float(mean[top] - max(mean[0], mean[-1])),
                "recovered": recovered_at(tokens, mean, 0.0),
                "recovered_to_tolerance": recovered_at(tokens, mean, tolerance),
                "spacing": float(tokens[1] - tokens[0]),
            }
        )
    return rows


def _with_interval(values: np.ndarray) -> list[float | None]:
    """[mean, low, high] over seeds."""
    mean, count = float(values.mean()), len(values)
    if count < 2:
        return [mean, None, None]
    half = student(count - 1) * float(values.std(ddof=1)) / np.sqrt(count)
    return [mean, mean - half, mean + half]


def recovered_at(tokens: np.ndarray, values: np.ndarray, limit: float) -> float | None:
    """The token count from which a curve stays at or below a limit; None if it ends above.

    >>> recovered_at(np.array([0.0, 10, 20, 30]), np.array([0.0, 4, 2, -2]), 0.0)
    25.0
    """
    above = np.flatnonzero(values > limit)
    if not len(above):
        return 0.0
    last = int(above[-1])
    if last == len(values) - 1:
        return None
    part = (values[last] - limit) / (values[last] - values[last + 1])
    return float(tokens[last] + part * (tokens[last + 1] - tokens[last]))
