"""Learning the edges of Skill-It: how far training on one source lowers the held-out loss of another."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rlpretrain.config import ConfigError, PretrainConfig, StopConfig
from rlpretrain.config.io import to_dict
from rlpretrain.evaluation.intervals import student
from rlpretrain.files import check_file
from rlpretrain.objectives import parse_section
from rlpretrain.ranks import join
from rlpretrain.training.mixing import held_out_loss
from rlpretrain.training.planning import check_settings
from rlpretrain.training.pretrainer import Pretrainer
from rlpretrain.training.records import write_json
from rlpretrain.training.run import Run
from rlpretrain.training.same_settings import MACHINE, changes, without
from rollout.folders import MARK

Losses = Mapping[str, Mapping[str, float]]
"""Short run → source → held-out loss after the run, in nats per token."""
Falls = dict[str, dict[str, float]]
"""Trained source → source whose loss falls → fall; 1 is what a source's own documents do for it, and a loss
that rose counts below 0.
"""
BASE = "(base)"
"""The run without a step; no source can have this name."""
RULES = {
    False: "A_ij = max(0, L_j(base) - L_j(i)) / (L_j(base) - L_j(j))",
    True: "A_ij = max(0, L_j(j) - L_j(i + j)) / (L_j(base) - L_j(j)), A_jj = 1",
}
"""How edges follow from losses: of single sources, and of pairs."""


@dataclass(frozen=True, slots=True)
class ShortRun:
    """A training from the base on some of the sources, in equal shares; on none, the base itself."""

    sources: tuple[str, ...]

    @property
    def name(self) -> str:
        """The names of its sources, joined by "+"."""
        return "+".join(self.sources) or BASE


def plan(config: PretrainConfig, steps: int, pairs: bool) -> list[ShortRun]:
    """The short runs, the base first. Raises ConfigError for a configuration that gives no edges."""
    names = list(config.data.sources)
    files = config.eval.data if isinstance(config.eval.data, dict) else {}
    if len(names) < 2:
        raise ConfigError("edges are between several data.sources: name at least two")
    if missing := [name for name in names if name not in files]:
        raise ConfigError(
            f"edges need held-out documents of every source: eval.data has no {', '.join(missing)}"
        )
    if config.optim.warmup_steps >= steps:
        raise ConfigError(
            f"optim.warmup_steps {config.optim.warmup_steps} leave no step of --steps {steps} at the full "
            "learning rate: give more --steps, or a lower --optim.warmup_steps"
        )
    runs = [ShortRun(()), *(ShortRun((name,)) for name in names)]
    if pairs:
        runs += [ShortRun(pair) for pair in itertools.combinations(sorted(names), 2)]
    for run in runs[1:]:
        short = short_config(config, run, steps, Path())
        check_settings(short, parse_section(short.objective)[0], ranks=1)
    return runs


def short_config(config: PretrainConfig, run: ShortRun, steps: int, folder: Path) -> PretrainConfig:
    """The configuration of a short run: next-token training on its sources, evaluated on all at its end.

    An objective with thoughts is replaced by `ntp`.
    """
    trained = run.sources or tuple(config.data.sources)
    sources = {
        name: replace(source, weight=float(name in trained), next_token=True, exhausted="repeat", passes=None)
        for name, source in config.data.sources.items()
    }
    thinks = parse_section(config.objective)[0].has_positions
    return replace(
        config,
        data=replace(config.data, sources=sources, mixing=None),
        objective={"name": "ntp"} if thinks else config.objective,
        loss=replace(config.loss, terms=()) if thinks else config.loss,
        max_steps=steps,
        epochs=None,
        eval=replace(config.eval, every=0, tasks=()),
        checkpoint=replace(config.checkpoint, every=0),
        average=None,
        stop=StopConfig(collapse=False),
        replay=None,
        save_rollouts=False,
        report_to=(),
        push_to_hub=None,
        output_dir=str(folder),
    )


def learn_edges(
    config: PretrainConfig,
    steps: int,
    out: Path,
    pairs: bool = False,
    seeds: int = 1,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Do the short runs, write their edges to `out`, and return what was written.

    With several `seeds` (`config.seed` and those after it), an edge is the mean over them, with a 95%
    interval (Student's t). The losses of each run are kept beside `out`, so that the same call goes on after
    an interruption. `say` gets a line for each run. Raises ConfigError if a source does not learn from
    itself, or if the runs that are kept had other settings, or if a file or folder in the way is not of this
    command.
    """
    runs, folder, ranks = plan(config, steps, pairs), check_out(out), join(config.device)
    first, names = ranks.first, list(config.data.sources)
    ranks.barrier()  # all have looked
    by_seed: list[dict[str, Any]] = []
    for seed in range(config.seed, config.seed + seeds):
        place = folder if seed == config.seed else folder / f"seed-{seed}"
        if first:
            place.mkdir(parents=True, exist_ok=True)
            (folder / MARK).touch()
        records = {}
        for run in runs:
            short = short_config(replace(config, seed=seed), run, steps, place / f"{run.name}.run")
            records[run.name] = _do(short, run, place, first)
            losses = ", ".join(f"{name} {loss:.4f}" for name, loss in records[run.name]["losses"].items())
            number = len(by_seed) * len(runs) + len(records)
            of_seed = f"seed {seed}, " if seeds > 1 else ""
            if first:
                say(f"{number} of {seeds * len(runs)}: {of_seed}{run.name}: held-out loss of {losses}")
        by_seed.append(
            {
                "seed": seed,
                "losses": {name: record["losses"] for name, record in records.items()},
                "trained_tokens": {name: record["tokens"] for name, record in records.items()},
            }
        )
    falls = [compute_falls(of_seed["losses"], names, pairs) for of_seed in by_seed]
    result = {
        **mean_edges(falls),
        "rule": RULES[pairs],
        "steps": steps,
        "model": config.model.path,
        "seeds": by_seed,
    }
    if first:
        write_json(out, result)
    return result


def check_out(out: Path) -> Path:
    """The folder beside `out` for the short runs. ConfigError for what this command did not write."""
    check_file(out, "--out")
    if out.exists() and "rule" not in _read(out):
        raise ConfigError(f"--out {out} exists and has no learnt edges: choose another name")
    folder = out.with_suffix(".runs")
    if folder == out:
        raise ConfigError(f"--out {out}: the folder of the short runs has this name: end it with .json")
    if folder.exists() and not (folder / MARK).is_file():
        raise ConfigError(
            f"{folder} exists and is not of this command, which keeps its short runs there: choose another "
            "--out"
        )
    return folder


def mean_edges(falls: Sequence[Falls]) -> dict[str, Any]:
    """`edges`: the mean over seeds of each relative fall, or 0 where the loss rose.

    With several seeds also `intervals`: [low, high] of the mean before it is cut at 0.
    """
    edges: dict[str, dict[str, float]] = {}
    intervals: dict[str, dict[str, list[float]]] = {}
    for source, targets in falls[0].items():
        edges[source], intervals[source] = {}, {}
        for target in targets:
            values = [of_seed[source][target] for of_seed in falls]
            edges[source][target] = max(0.0, fmean(values))
            if len(values) > 1:
                half = student(len(values) - 1) * stdev(values) / math.sqrt(len(values))
                intervals[source][target] = [fmean(values) - half, fmean(values) + half]
    return {"edges": edges} | ({"intervals": intervals} if len(falls) > 1 else {})


def compute_falls(losses: Losses, names: Sequence[str], pairs: bool) -> Falls:
    """The falls of one seed's held-out losses. ConfigError if a source does not learn from itself."""
    falls: Falls = {name: {} for name in names}
    for run, measured in losses.items():
        if unknown := [name for name in names if not math.isfinite(_number(measured[name]))]:
            raise ConfigError(
                f"after the short run {run}, the held-out loss of '{unknown[0]}' is not a finite number, so "
                "no edge can be measured: choose a lower learning rate, or look at its documents"
            )
    for target in names:
        before, after = losses[BASE][target], losses[target][target]
        if not after < before:
            raise ConfigError(
                f"training on '{target}' did not lower its own held-out loss ({before:.4f} before, "
                f"{after:.4f} after), so nothing can be measured against it: give more --steps, or another "
                "learning rate"
            )
        for source in names:
            if source == target:
                fall = before - after
            elif pairs:
                pair = ShortRun(tuple(sorted((source, target))))
                fall = after - losses[pair.name][target]
            else:
                fall = before - losses[source][target]
            falls[source][target] = fall / (before - after)
    return falls


def _do(config: PretrainConfig, run: ShortRun, folder: Path, first: bool) -> dict[str, Any]:
    """The record of a short run: that of an earlier call, or of a run now."""
    file, settings = folder / f"{run.name}.json", json.loads(json.dumps(to_dict(config)))
    if file.exists():
        record = _read(file)
        if not {"losses", "tokens", "config"} <= record.keys():
            raise ConfigError(
                f"{file} is damaged, or not of a short run: remove it, and the run is done again"
            )
        different = changes(without(record["config"], MACHINE), without(settings, MACHINE))
        if different:
            raise ConfigError(
                f"{file} is of a run with other settings: {'; '.join(different)}. Remove {folder}, or choose "
                "another --out"
            )
        return record
    if run.sources:
        row = Pretrainer(config).train(resume="auto")
    else:
        base = Run(config, "auto")
        try:
            row = base.evaluation.evaluate(base.console.evaluating)
        finally:
            base.close()
    record = {
        "losses": {name: held_out_loss(row, name) for name in config.data.sources},
        "tokens": row.get("num_input_tokens", 0),
        "config": settings,
    }
    if first:
        write_json(file, record)
        shutil.rmtree(config.output_dir)  # its model is of no further use
    return record


def _read(file: Path) -> dict[str, Any]:
    """The mapping in a JSON file; empty for any other file."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _number(loss: float | None) -> float:
    """A loss of a record, whose JSON has null for NaN."""
    return math.nan if loss is None else loss
