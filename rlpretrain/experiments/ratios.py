"""`rlpretrain ratios`: trains a grid of mixture ratios and fits the critical mixture ratio.

The trainings are those of `rlpretrain compare`, with a method for each ratio and variant: run folders,
processes, resume and the common evaluation are the same. The results are written after every run, so that a
grid can be read while it goes on.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from rlpretrain.config import ConfigError
from rlpretrain.experiments.compare import run
from rlpretrain.experiments.experiment import Experiment
from rlpretrain.experiments.power_laws import PowerLaw
from rlpretrain.experiments.ratio_curves import curve_laws, stability_gaps
from rlpretrain.experiments.ratio_fit import (
    TAILS,
    CriticalRatio,
    RatioLaw,
    band,
    critical_over_tokens,
    find_critical,
    fit_ratio_law,
)
from rlpretrain.experiments.ratio_grid import GROUPS, Grid, load_grid
from rlpretrain.experiments.ratio_losses import GridLosses, count_done, read_losses
from rlpretrain.experiments.ratio_plot import plot_ratios
from rlpretrain.experiments.ratio_tables import as_markdown
from rlpretrain.experiments.ratio_trust import judge_critical, judge_law
from rlpretrain.files import finite, writing
from rlpretrain.training.records import write_json

Say = Callable[[str], None]
BAND_POINTS = 101


def run_ratios(path: str | Path, *, jobs: int | None = None, say: Say = print) -> dict[str, Any]:
    """Train and evaluate what is not done, write the results and return them; `jobs` replaces the file's."""
    path = Path(path).expanduser()
    grid, experiment = load_grid(path)
    experiment = replace(experiment, jobs=jobs) if jobs else experiment
    check_folder(grid, Path(experiment.output_dir))
    progress = _Progress(grid, experiment, path.parent, say)
    run(experiment, path.parent, say=progress)
    return write_results(grid, experiment, path.parent, say)


def check_folder(grid: Grid, folder: Path) -> None:
    """Raise ConfigError if the results of another grid would be overwritten; a grid may be extended."""
    try:
        before = json.loads((folder / "ratios.json").read_text())
        was = {name: before[name] for name in ("groups", "ratios", "seeds", "variants")}
    except FileNotFoundError:
        return
    except (OSError, ValueError, LookupError, TypeError):
        raise ConfigError(
            f"output_dir {folder} has a ratios.json that no grid wrote: choose another"
        ) from None
    now = {"ratios": grid.ratios, "seeds": grid.seeds, "variants": grid.names}
    lost = [name for name, values in now.items() if set(was[name]) - set(values)]
    if was["groups"] != grid.sources:
        lost.append("general and domain")
    if lost:
        raise ConfigError(
            f"output_dir {folder} has the results of another grid ({', '.join(lost)} differ), which would be "
            "overwritten: choose another output_dir"
        )


def write_results(grid: Grid, experiment: Experiment, where: Path, say: Say = print) -> dict[str, Any]:
    """Write ratios.json, ratios.md and ratios.svg of the finished runs, and return what the first holds."""
    results = collect_ratios(grid, experiment, where)
    folder = Path(experiment.output_dir)
    write_json(folder / "ratios.json", results)
    text, work = as_markdown(results), folder / ".ratios.md.tmp"
    with writing(folder / "ratios.md"):
        work.write_text(text, encoding="utf-8")
        work.replace(folder / "ratios.md")
    plotted = any(results["variants"].values())
    if plotted:
        try:
            plot_ratios(results, folder / "ratios.svg")
        except ImportError:
            say('no plot: pip install "rlpretrain[plot]"')
            plotted = False
    return results | {"plotted": plotted}


def collect_ratios(grid: Grid, experiment: Experiment, where: Path) -> dict[str, Any]:
    """The results of the finished runs of a grid, as plain values."""
    done, total = count_done(experiment, where)
    variants: dict[str, Any] = {}
    for variant in grid.names:
        losses = read_losses(grid, experiment, where, variant)
        if losses is None:
            variants[variant] = None
            continue
        missing = len(grid.ratios) * len(grid.seeds) - len(losses.ratios) * len(losses.seeds)
        variants[variant] = analyse(losses, grid.tolerance, draws=grid.draws, missing=missing)
    reasons = [
        f"{variant}: {reason['why']}" if variant else reason["why"]
        for variant, result in variants.items()
        for reason in (result["reasons"] if result else [{"why": "no ratio is finished"}])
    ]
    return finite(
        {
            "trusted": not reasons,
            "reasons": reasons,
            "folder": str(Path(experiment.output_dir)),
            "runs": {"done": done, "of": total},
            "groups": grid.sources,
            "ratios": list(grid.ratios),
            "seeds": list(grid.seeds),
            "tolerance": grid.tolerance,
            "variants": variants,
        }
    )


def analyse(
    losses: GridLosses, tolerance: float, *, draws: int = 2000, missing: int = 0, seed: int = 0
) -> dict[str, Any]:
    """Laws, critical ratio with its interval, reasons against it, and the stability gap of one variant.

    `missing` runs of its grid are not finished. Losses are in nats per token and are changes from the base
    model, a ratio is the share of domain text.
    """
    rng = np.random.default_rng(seed)
    laws = {group: fit_ratio_law(losses, group, rng, draws) for group in GROUPS}
    critical = find_critical(laws["general"], losses.ratios, tolerance)
    reasons = judge_critical(critical, laws["general"], laws["domain"], losses, tolerance, missing)
    against_domain = judge_law(laws["domain"], losses.ratios, "domain", tolerance)
    return {
        "trusted": not reasons,
        "reasons": [asdict(reason) for reason in reasons],
        "critical": _critical_values(critical, losses, tolerance),
        "ratios": losses.ratios.tolist(),
        "tokens": [float(losses.tokens.min()), float(losses.tokens.max())],
        "losses": {group: _loss_values(losses, group, law) for group, law in laws.items()},
        "laws": {
            "general": _law_values(laws["general"], losses.ratios),
            "domain": _law_values(laws["domain"], losses.ratios)
            | {"trusted": not against_domain, "reasons": [asdict(reason) for reason in against_domain]},
        },
        "curves": {
            "tokens": losses.curve_tokens.tolist(),
            **{group: data.curves.mean(0).tolist() for group, data in losses.groups.items()},
        },
        "curve_laws": curve_laws(losses),
        "stability": stability_gaps(losses, tolerance),
    }


def _critical_values(critical: CriticalRatio | None, losses: GridLosses, tolerance: float) -> dict[str, Any]:
    """`ratio` is null where no ratio from 0 to 1 is critical; `side` says which: none or all are feasible."""
    if critical is None:
        return {"ratio": None, "interval": None, "side": None, "left_out": {}, "over_tokens": None}
    side = None if np.isfinite(critical.value) else "all" if critical.value > 0 else "none"
    return {
        "ratio": critical.value,
        "side": side,
        "interval": list(critical.interval),
        "left_out": {f"{ratio:g}": value for ratio, value in critical.left_out.items()},
        "over_tokens": critical_over_tokens(losses, tolerance),
    }


def _loss_values(losses: GridLosses, group: str, law: RatioLaw) -> dict[str, Any]:
    """The base model's loss, and the change from it at each ratio as [mean, low, high] and by seed."""
    data = losses.groups[group]
    low, high = np.quantile(law.draws, TAILS, axis=0)
    return {
        "base": float(data.base.mean()),
        "change": np.stack([law.mean, low, high], 1).tolist(),
        "by_seed": data.changes.tolist(),
    }


def _law_values(law: RatioLaw, ratios: np.ndarray) -> dict[str, Any]:
    """The law's parameters as [value, low, high], and how well it fits."""
    values: dict[str, Any] = {
        "fitted_ratios": ratios[law.used].tolist(),
        "residual": law.residual,
        "left_out": {f"{ratios[k]:g}": float(law.left_out[k]) for k in law.left_out_laws},
    }
    if law.law is None or law.drawn_laws is None:
        return values
    for name in ("alpha", "exponent", "beta"):
        low, high = np.quantile(getattr(law.drawn_laws, name), TAILS)
        values[name] = [float(getattr(law.law, name)), float(low), float(high)]
    return values | {"band": band(law, _band_ratios(law.law, ratios))}


def _band_ratios(law: PowerLaw, ratios: np.ndarray) -> np.ndarray:
    """Ratios for a curve; a law that may have no value at 0 begins at the smallest ratio above it."""
    start = 0.0 if law.bounds.low > 0 else ratios[ratios > 0].min()
    return np.linspace(start, ratios.max(), BAND_POINTS)


class _Progress:
    """Says how many runs are done and what time is left, and writes the results so far."""

    def __init__(self, grid: Grid, experiment: Experiment, where: Path, say: Say):
        self.grid, self.experiment, self.where, self.say = grid, experiment, where, say
        self.before, self.total = count_done(experiment, where)
        self.done, self.begin = 0, time.monotonic()

    def __call__(self, line: str) -> None:
        self.done += not line.endswith(": done before")
        done = min(self.before + self.done, self.total)
        left = ""
        if self.done and done < self.total:
            seconds = (time.monotonic() - self.begin) / self.done * (self.total - done)
            left = f", about {_duration(seconds)} left"
        self.say(f"[{done}/{self.total}{left}] {line}")
        if self.done and done < self.total:
            write_results(self.grid, self.experiment, self.where, self.say)


def _duration(seconds: float) -> str:
    """
    >>> _duration(42), _duration(400), _duration(8000)
    ('42 s', '7 min', '2.2 h')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
