"""The held-out losses of a grid's runs: by source, document and seed at the end, and over tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlpretrain.evaluation.intervals import row_of
from rlpretrain.experiments.curves import Log, read_logs
from rlpretrain.experiments.experiment import BASE, Experiment, Job
from rlpretrain.experiments.jobs import evaluation_to_do, training_to_do
from rlpretrain.experiments.ratio_grid import GROUPS, Grid, method_of

CURVE_POINTS = 60
"""Most token counts of a curve."""


@dataclass(frozen=True, slots=True)
class SourceLosses:
    """The losses of one source's held-out rows (N), of runs with M ratios and S seeds."""

    share: float
    """Share of the source in its group."""
    sums: np.ndarray
    """[S, M, N] sums of the runs' losses over the tokens of each row."""
    base: np.ndarray
    """[S, N] the same of the base model."""
    tokens: np.ndarray
    """[N] predicted tokens of each row."""

    def changes(self, times: np.ndarray) -> np.ndarray:
        """[..., S, M] mean change from the base model per token; `times` [..., N]: how often a row counts."""
        differences = self.sums - self.base[:, None]
        total = np.einsum("...n,smn->...sm", times, differences)
        return total / (times @ self.tokens)[..., None, None]


@dataclass(frozen=True, slots=True)
class GroupLosses:
    """The loss of a group of sources: the mean of theirs by their shares in the group."""

    sources: list[SourceLosses]
    curves: np.ndarray
    """[S, M, K] change from the base model at the token counts of the grid; the first is 0."""

    @property
    def base(self) -> np.ndarray:
        """[S] the base model's loss."""
        means = [source.share * source.base.sum(-1) / source.tokens.sum() for source in self.sources]
        return np.sum(means, 0)

    @property
    def changes(self) -> np.ndarray:
        """[S, M] change from the base model at the end of the runs."""
        return np.sum([s.share * s.changes(np.ones(len(s.tokens))) for s in self.sources], 0)

    @property
    def rows(self) -> int:
        """The fewest held-out rows of a source."""
        return min(len(source.tokens) for source in self.sources)

    def resampled(self, rng: np.random.Generator, draws: int) -> np.ndarray:
        """[draws, S, M] changes at the end, over held-out rows drawn with replacement in each source."""
        parts = []
        for source in self.sources:
            count = len(source.tokens)
            times = rng.multinomial(count, np.full(count, 1 / count), size=draws).astype(float)
            parts.append(source.share * source.changes(times))
        return np.sum(parts, 0)


@dataclass(frozen=True, slots=True)
class GridLosses:
    """The losses of one variant of a grid: M ratios that are trained with all S seeds."""

    ratios: np.ndarray
    """[M]"""
    seeds: Sequence[int]
    groups: dict[str, GroupLosses]
    tokens: np.ndarray
    """[S, M] tokens of documents that each run read."""
    curve_tokens: np.ndarray
    """[K] token counts of the curves, from 0 to the fewest that a run read."""
    ended: dict[str, str]
    """Run to the reason for which it ended before its length."""


def read_losses(grid: Grid, experiment: Experiment, where: Path, variant: str) -> GridLosses | None:
    """The losses of the seeds that have finished all ratios; None before a seed has finished any.

    Before there is such a seed, those of the first seed with a ratio, and of the ratios that it has finished.
    """
    folder = Path(experiment.output_dir)
    finished = {
        seed: [ratio for ratio in grid.ratios if _is_done(experiment, where, method_of(variant, ratio), seed)]
        for seed in experiment.seeds
        if _is_done(experiment, where, BASE, seed)
    }
    seeds = [seed for seed, ratios in finished.items() if len(ratios) == len(grid.ratios)]
    seeds = seeds or [seed for seed, ratios in finished.items() if ratios][:1]
    if not seeds:
        return None
    ratios = finished[seeds[0]]
    names = [method_of(variant, ratio) for ratio in ratios]
    runs = [[folder / f"{name}-{seed}" for name in names] for seed in seeds]
    evaluations = [[_common(run) for run in of_seed] for of_seed in runs]
    bases = [_common(folder / f"{BASE}-{seed}") for seed in seeds]
    logs = [read_logs(of_seed) for of_seed in runs]
    tokens = np.array([[log[-1]["num_input_tokens"] for log in of_seed] for of_seed in logs], float)
    curve_tokens = _curve_tokens(logs, tokens.min())
    groups = {}
    for group in GROUPS:
        sources = {
            name: _source_losses(name, share, evaluations, bases)
            for name, share in grid.sources[group].items()
        }
        starts = {name: source.base.sum(-1) / source.tokens.sum() for name, source in sources.items()}
        curves = [
            [_changes_over_tokens(log, grid.sources[group], starts, s, curve_tokens) for log in of_seed]
            for s, of_seed in enumerate(logs)
        ]
        groups[group] = GroupLosses(list(sources.values()), np.array(curves))
    ended = {run.name: reason for of_seed in runs for run in of_seed if (reason := _ended_early(run))}
    return GridLosses(np.array(ratios), seeds, groups, tokens, curve_tokens, ended)


def count_done(experiment: Experiment, where: Path) -> tuple[int, int]:
    """Finished runs and all runs, the base model's evaluations included."""
    done = [
        _is_done(experiment, where, name, seed)
        for name in (*experiment.methods, BASE)
        for seed in experiment.seeds
    ]
    return sum(done), len(done)


def _is_done(experiment: Experiment, where: Path, name: str, seed: int) -> bool:
    job = Job(experiment=experiment, name=name, seed=seed, where=where)
    if not (job.folder / "evaluation.json").exists():
        return False
    return training_to_do(job) is None and evaluation_to_do(job) is None


def _common(run: Path) -> dict[str, Any]:
    """What the common evaluation measured of a run."""
    return json.loads((run / "evaluation.json").read_text())["common"]


def _ended_early(run: Path) -> str | None:
    """Why a run ended, if not by the grid's budget."""
    stopped = json.loads((run / "run.json").read_text())["stopped"]
    return None if stopped is None or stopped.startswith("budget") else stopped


def _source_losses(
    name: str, share: float, evaluations: list[list[dict[str, Any]]], bases: list[dict[str, Any]]
) -> SourceLosses:
    """The losses of a source, summed over the documents of each source row."""
    places = [k for k, row in enumerate(bases[0]["rows"]) if row.startswith(f"{name}/")]
    names, row_of_place = np.unique([row_of(bases[0]["rows"][k]) for k in places], return_inverse=True)

    def sums(values: list[float], tokens: list[float]) -> np.ndarray:
        weighted = np.array(values, float)[places] * np.array(tokens, float)[places]
        return np.bincount(row_of_place, weighted, minlength=len(names))

    losses = [[sums(run["no_think_loss"], run["tokens"]) for run in of_seed] for of_seed in evaluations]
    of_base = [sums(base["no_think_loss"], base["tokens"]) for base in bases]
    counts = sums([1.0] * len(bases[0]["rows"]), bases[0]["tokens"])
    return SourceLosses(share, np.array(losses), np.array(of_base), counts)


def _evaluated(log: Log, names: Sequence[str]) -> Log:
    """The rows of a log in which every source was evaluated."""
    return [row for row in log if all(row.get(f"eval/{name}/no_think_loss") is not None for name in names)]


def _curve_tokens(logs: list[list[Log]], most: float) -> np.ndarray:
    """Token counts for the curves: as many as the run with the fewest evaluations has, and 0."""
    counts = [
        sum(any(key.startswith("eval/") for key in row) for row in log) for of_seed in logs for log in of_seed
    ]
    return np.linspace(0, most, min(*counts, CURVE_POINTS) + 1)


def _changes_over_tokens(
    log: Log, shares: dict[str, float], starts: dict[str, np.ndarray], seed: int, tokens: np.ndarray
) -> np.ndarray:
    """[K] the change of a group's loss at token counts, between evaluations in a straight line."""
    rows = _evaluated(log, list(shares))
    places = [0.0, *(row["num_input_tokens"] or 0.0 for row in rows)]
    total = np.zeros(len(tokens))
    for name, share in shares.items():
        values = [row[f"eval/{name}/no_think_loss"] for row in rows]
        start = starts[name][seed]
        total += share * np.interp(tokens, places, [0.0, *(float(v or 0.0) - start for v in values)])
    return total
