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
    reason = run.monitor.observe(
        gain=row.get("ig/self", math.nan),
        no_think_loss=row["ntp/loss"],
        grad_norm=row.get("grad_norm", math.nan),
        thought_length=row.get("completions/mean_length", math.nan),
    )
    return f"collapse: {reason}" if reason else None


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
