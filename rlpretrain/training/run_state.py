"""The state of a run: written into a checkpoint, and restored from it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rlpretrain.config import ConfigError
from rlpretrain.config.io import to_dict
from rlpretrain.training import abandoned, checkpoint, records, run_stop, same_settings
from rlpretrain.training.redealing import redeal

if TYPE_CHECKING:
    from rlpretrain.training.run import Run


def resolved(run: Run) -> dict[str, Any]:
    """The configuration with the objective's defaults and its reduction."""
    objective = {"name": run.config.objective.get("name", "rlp"), **asdict(run.objective.config)}
    out = to_dict(run.config)
    return out | {
        "objective": objective,
        "loss": out["loss"] | {"reduction": run.objective.setting.reduction},
    }


def save(run: Run) -> None:
    """Write the checkpoint of the current step. All ranks call it."""
    state = {
        "config": resolved(run),
        "backend": type(run.policy).__name__,
        "best": run.best,
        "spent": asdict(run.spent),
        "skipped": run.skipped,
        "skipped_in_row": run.skipped_in_row,
        "monitor": run.monitor.state_dict(),
        "source_monitors": {name: monitor.state_dict() for name, monitor in run.source_monitors.items()},
        "mixing": run.mixing.state_dict() if run.mixing else None,
    }
    rank_state = {
        "source": run.source.state_dict(),
        "baseline": run.baseline.state_dict(),
        "rng": torch.get_rng_state(),
        "reference": run.reference.state_dict() if run.reference else {},
        "objective": run.objective.state_dict(),
    }
    parts: dict[str, Any] = {"policy": run.policy} | ({"average": run.average} if run.average else {})
    checkpoint.save(run.folder, run.step, run.ranks, parts, state, rank_state)
    if run.ranks.first:
        checkpoint.rotate(run.folder, run.config.checkpoint.keep, run.best["step"])


def restore(run: Run, path: Path) -> None:
    """Restore the checkpoint `path`. All ranks call it."""
    backend, any_ranks = type(run.policy).__name__, getattr(run.policy, "loads_on_any_ranks", False)
    state, rank_states = checkpoint.read(path, run.ranks, backend, resolved(run), any_ranks)
    rank_state = rank_states[0]
    if state["ranks"] != run.ranks.size:
        rank_state = redeal(rank_states, run.ranks.rank, run.ranks.size, run.source)
    _check_annealing(run, path, state)
    run.step, run.best, run.spent = state["step"], state["best"], records.Spent(**state["spent"])
    run.stopped = run_stop.over_budget(run)
    run.skipped, run.skipped_in_row = state["skipped"], state["skipped_in_row"]
    run.monitor.load_state_dict(state["monitor"])
    for name, monitor in run.source_monitors.items():
        monitor.load_state_dict(state["source_monitors"][name])
    if run.mixing:
        run.mixing.load_state_dict(state["mixing"])
    run.source.load_state_dict(rank_state["source"])
    run.stopped = run.stopped or run_stop.exhausted(run)
    run.baseline.load_state_dict(rank_state["baseline"])
    if run.reference:
        run.reference.load_state_dict(rank_state.get("reference", {}))  # none in older versions
    run.objective.load_state_dict(rank_state.get("objective", {}))
    torch.set_rng_state(rank_state["rng"])
    run.policy.load(path)
    if run.average:
        run.average.load(path)


def _check_annealing(run: Run, path: Path, state: dict[str, Any]) -> None:
    """Raise ConfigError if another `anneal_from` changes the learning rate of completed steps."""
    schedule, now = state["config"]["optim"]["schedule"], run.config.optim.schedule.anneal_from
    before = None if isinstance(schedule, str) else schedule["anneal_from"]  # a string in older versions
    early = [begin for begin in (before, now) if begin is not None and begin < state["step"]]
    if before != now and early:
        raise ConfigError(
            f"cannot resume from {path}: optim.schedule.anneal_from was {before}, is {now}; only a decay "
            f"that begins at step {state['step']} or later can be added, moved or removed there"
        )


def set_aside(run: Run, resume: str | bool | None) -> str | None:
    """Move what a resumed run wrote after its checkpoint to another folder; returns a line about it, or None.

    All ranks call it before the first step, also if the run starts again because it has no checkpoint.
    """
    message = None
    if resume and run.resumed_from is None and (run.folder / "run.json").is_file():
        same_settings.check_same(_config_of(run.folder), resolved(run), run.folder)
    if resume and run.ranks.first:
        message = abandoned.set_aside(run.folder, run.step, run.resumed_from)
    run.ranks.barrier()
    return message


def _config_of(folder: Path) -> dict[str, Any]:
    """The settings of the run that a folder holds."""
    try:
        return json.loads((folder / "run.json").read_text())["config"]
    except (ValueError, LookupError, TypeError):
        raise ConfigError(
            f"{folder / 'run.json'} is damaged: remove {folder}, or choose another output_dir"
        ) from None
