"""When a fitted critical ratio is not to be trusted, and why: each rule gives a sentence, or nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from rlpretrain.experiments.ratio_fit import PARAMETERS, TAILS, CriticalRatio, RatioLaw
from rlpretrain.experiments.ratio_losses import GridLosses

FEWEST_RATIOS = PARAMETERS + 2
FEWEST_SEEDS = 3
FEWEST_ROWS = 20
ERRORS = 2.0
"""Standard errors over seeds that pass for noise."""
SHARE_OF_TOLERANCE = 0.1
"""Misfits below this share of the tolerance pass: they hardly move the crossing."""
MOST_SPREAD_OF_TOKENS = 0.02


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a result is not to be trusted."""

    name: str
    why: str


def judge_law(law: RatioLaw, ratios: np.ndarray, group: str, tolerance: float) -> list[Reason]:
    """The reasons against one group's law."""
    return [Reason(name, why) for name, why in _against_law(law, ratios, group, tolerance)]


def judge_critical(
    critical: CriticalRatio | None,
    general: RatioLaw,
    domain: RatioLaw,
    losses: GridLosses,
    tolerance: float,
    missing: int,
) -> list[Reason]:
    """The reasons against the critical ratio: those against the general law, and its own."""
    reasons = judge_law(general, losses.ratios, "general", tolerance)
    reasons += [Reason(name, why) for name, why in _against_data(losses, missing)]
    reasons += [
        Reason(name, why) for name, why in _against_critical(critical, general, domain, losses, tolerance)
    ]
    return reasons


def _against_data(losses: GridLosses, missing: int) -> Iterator[tuple[str, str]]:
    if missing:
        yield "missing_runs", f"{missing} runs of the grid are not finished"
    if losses.ended:
        run, reason = next(iter(losses.ended.items()))
        yield "ended_early", f"{len(losses.ended)} runs ended before their length, such as {run} ({reason})"
    if len(losses.seeds) < FEWEST_SEEDS:
        yield (
            "few_seeds",
            f"{len(losses.seeds)} seeds: the spread over runs needs {FEWEST_SEEDS} to be known at all",
        )
    rows = min(group.rows for group in losses.groups.values())
    if rows < FEWEST_ROWS:
        yield "few_documents", f"a source has {rows} held-out documents, fewer than {FEWEST_ROWS}"
    low, high = losses.tokens.min(), losses.tokens.max()
    if high > low * (1 + MOST_SPREAD_OF_TOKENS):
        yield (
            "unequal_tokens",
            f"the runs read between {low:.0f} and {high:.0f} tokens, so their losses are not at one budget: "
            "set `tokens`",
        )


def _against_law(
    law: RatioLaw, ratios: np.ndarray, group: str, tolerance: float
) -> Iterator[tuple[str, str]]:
    changes, noise = law.mean[law.used], noise_of(law)
    if not np.isfinite(law.mean).all():
        yield "not_finite", f"the {group} loss of some runs is NaN or infinite"
        return
    if law.used.sum() < FEWEST_RATIOS:
        yield (
            "few_ratios",
            f"{law.used.sum()} ratios for the {PARAMETERS} parameters of the {group} law; it takes at least "
            f"{FEWEST_RATIOS} to see whether it holds",
        )
    if not law.used.any():
        return
    span = np.ptp(changes)
    if not np.isfinite(law.seed_error).all():  # one seed: what is noise is not known
        pass
    elif span <= 2 * ERRORS * noise:  # the range of five equal means is less in 19 of 20 cases
        yield (
            "flat",
            f"the {group} loss differs by {span:.4f} nats over all ratios, within the noise of the seeds",
        )
    elif (wrong := _wrong_way(law, ratios, group, noise)) is not None:
        yield "not_monotone", wrong
    if law.law is None:
        return
    if bool(law.law.at_bound):
        yield (
            "at_bound",
            f"the exponent of the {group} law, {float(law.law.exponent):.2f}, is at the bound of its range",
        )
    small = max(ERRORS * noise, SHARE_OF_TOLERANCE * tolerance)
    if law.residual > small:
        yield (
            "misfit",
            f"the {group} law misses the means by {law.residual:.4f} nats, more than {small:.4f} (the larger "
            f"of {ERRORS:g} standard errors over seeds and {SHARE_OF_TOLERANCE:.0%} of the tolerance)",
        )
    places = np.flatnonzero(np.isfinite(law.left_out))[1:-1]  # the outer ones would be extrapolated
    if len(places):
        worst = places[np.abs(law.left_out[places]).argmax()]
        error, most = abs(law.left_out[worst]), max(2 * ERRORS * noise, tolerance / 2)
        if error > most:
            yield (
                "leave_one_out",
                f"without the ratio {ratios[worst]:g} the {group} law predicts its loss wrong by {error:.4f} "
                f"nats, more than {most:.4f}",
            )


def noise_of(law: RatioLaw) -> float:
    """The standard error over seeds, pooled over ratios; 0 with one seed."""
    errors = law.seed_error[np.isfinite(law.seed_error)]
    return float(np.sqrt((errors**2).mean())) if len(errors) else 0.0


def _wrong_way(law: RatioLaw, ratios: np.ndarray, group: str, noise: float) -> str | None:
    """A sentence on the largest step of the means against the direction that more domain text should give."""
    sign = 1 if group == "general" else -1
    means, places = sign * law.mean[law.used], ratios[law.used]
    steps = np.diff(means)
    worst = int(steps.argmin())
    if steps[worst] >= -ERRORS * noise * np.sqrt(2) or np.isclose(steps[worst], 0):
        return None
    verb = "falls" if group == "general" else "rises"
    return (
        f"the {group} loss {verb} by {-steps[worst]:.4f} nats from ratio {places[worst]:g} to "
        f"{places[worst + 1]:g}, more than the noise of the seeds"
    )


def _against_critical(
    critical: CriticalRatio | None, general: RatioLaw, domain: RatioLaw, losses: GridLosses, tolerance: float
) -> Iterator[tuple[str, str]]:
    if critical is None:
        if general.used.sum() < PARAMETERS:
            yield "no_law", "there are fewer ratios than parameters, so there is no law and no critical ratio"
        return
    measured = losses.ratios[general.used]
    low, high = measured.min(), measured.max()
    if critical.value > high:
        yield (
            "outside",
            f"the general loss is within the tolerance up to the largest fitted ratio, {high:g}: the "
            "critical ratio is beyond the grid, and a number there would be extrapolated",
        )
    elif critical.value < low:
        yield (
            "outside",
            f"the general loss is over the tolerance from the smallest ratio on, {low:g}: the critical ratio "
            "is below the grid, or there is none",
        )
    elif max(critical.outside) > TAILS[0]:
        side, end = ("below", low) if critical.outside[0] > critical.outside[1] else ("above", high)
        yield (
            "interval_outside",
            f"the 95% interval reaches {side} the fitted ratios ({end:g}), where its end is extrapolated: "
            "add ratios there, seeds, or documents",
        )
    width, half = critical.interval[1] - critical.interval[0], (high - low) / 2
    if width > half:
        yield (
            "wide_interval",
            f"the 95% interval is {width:.2f} wide, more than half of the range of the ratios ({half:.2f})",
        )
    moved = {ratio: np.clip(value, 0, 1) for ratio, value in critical.left_out.items() if low < ratio < high}
    at = np.clip(critical.value, 0, 1)
    if moved:
        ratio = max(moved, key=lambda r: abs(moved[r] - at))
        if abs(moved[ratio] - at) > half / 2:
            yield (
                "one_ratio_decides",
                f"without the ratio {ratio:g} the critical ratio is {moved[ratio]:.2f} in place of {at:.2f}",
            )
    if domain.law is not None and 0 < critical.value <= 1:
        change = float(domain.law.at(np.array([critical.value]))[0])
        if change >= 0:
            yield (
                "domain_not_learnt",
                f"the domain loss at the critical ratio is {change:+.4f} nats from the base model's: "
                "nothing is gained",
            )
