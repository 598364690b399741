"""Rules that end a run before its last step. Each returns its reason as a text, or None."""

from __future__ import annotations

import math
import signal
from collections.abc import Mapping
from typing import TYPE_CHECKING

from rewards.controls import CollapseMonitor
from rlpretrain.config import PretrainConfig

if TYPE_CHECKING:
    from rlpretrain.training.run import Run


def make_monitor(config: PretrainConfig) -> CollapseMonitor:
    """The monitor of `stop.collapse`."""
    return CollapseMonitor(window=config.stop.collapse_window, no_think_rise=config.stop.collapse_no_think)


def make_source_monitors(config: PretrainConfig) -> dict[str, CollapseMonitor]:
    """A monitor for the next-token loss of each named source."""
    return {name: make_monitor(config) for name in config.data.sources}


def over_budget(run: Run) -> str | None:
    """Stop if `stop.input_tokens` or `stop.flops` is reached."""
    return run.spent.over(run.config.stop.input_tokens, run.config.stop.flops)


def nonfinite(run: Run) -> str | None:
    """Stop after `stop.nonfinite` skipped steps in a row."""
    if run.skipped_in_row < run.config.stop.nonfinite:
        return None
    where = run.folder / "nonfinite"
    return f"nonfinite: {run.skipped_in_row} steps in a row skipped; the batches are in {where}"


def collapsed(run: Run, row: Mapping[str, float]) -> str | None:
    """Stop if the monitor of `stop.collapse` fires on a step's row."""
    if not run.config.stop.collapse or "ntp/loss" not in row or not run.objective.has_positions:
        return None
    # ig/frozen is not biased by a worse no-think arm, but is measured in some steps only. Where ig/self is
    # biased, the no-think loss rises.
    by_source = any(f"source/{name}/loss" in row for name in run.source_monitors)
    loss = math.nan if by_source else row["ntp/loss"]
    shared = {
        "grad_norm": row.get("grad_norm", math.nan),
        "thought_length": row.get("completions/mean_length", math.nan),
    }
    reason = run.monitor.observe(gain=row.get("ig/self", math.nan), no_think_loss=loss, **shared)
    for name, monitor in run.source_monitors.items():  # the loss of all together follows the weights
        loss = row.get(f"source/{name}/loss", math.nan)
        rise = monitor.observe(gain=math.nan, no_think_loss=loss, **shared)
        reason = reason or (rise and f"source '{name}': {rise}")
    return f"collapse: {reason}" if reason else None


def exhausted(run: Run) -> str | None:
    """Stop if a source that is not to be repeated has no documents left, on any rank. All ranks call it."""
    if not run.config.data.sources:
        return None
    return next(filter(None, run.ranks.gather(run.source.exhausted)), None)


def interrupted(run: Run) -> str | None:
    """Stop if a signal reached some rank. All ranks call it."""
    number = int(run.ranks.max([float(run.signals.number or 0)])[0])
    return f"interrupted: {signal.Signals(number).name}" if number else None


def was_interrupted(run: Run) -> bool:
    """Whether a signal stopped the run."""
    return run.stopped is not None and run.stopped.startswith("interrupted: ")


def out_of_patience(run: Run) -> str | None:
    """Stop after `stop.patience` evaluations in a row without a better gain."""
    if not run.config.stop.patience or run.best["stale"] < run.config.stop.patience:
        return None
    return f"patience: no better gain in {run.best['stale']} evaluations"
