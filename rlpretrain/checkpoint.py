"""Checkpoints that resume bit-identically: written aside and renamed, checked before they are read, rotated."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rlpretrain.config import ConfigError
from rlpretrain.config.io import build, to_dict
from rlpretrain.ranks import Ranks

FREE_TO_CHANGE = (
    "output_dir", "console", "log_every", "report_to", "push_to_hub", "threads", "max_steps", "epochs", "checkpoint", "eval",
    "stop", "device",
)  # fmt: skip
"""Settings that may differ between a checkpoint and the run that resumes from it."""


def save(
    folder: Path, step: int, ranks: Ranks, parts: Mapping[str, Any], state: dict[str, Any], rank_state: dict[str, Any]
) -> Path:
    """Write `folder`/checkpoint-<step> whole or not at all.

    `parts` are objects with `save(path)`; `state` is the same on all ranks, `rank_state` is each rank's own. The list of
    files with their sizes goes into state.json, last; then the folder gets its name.
    """
    final, work = folder / f"checkpoint-{step}", folder / f".checkpoint-{step}.tmp"
    if ranks.first:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
    ranks.barrier()
    for part in parts.values():
        part.save(work)
    torch.save(rank_state, work / f"rank-{ranks.rank}.pt")
    ranks.barrier()
    if ranks.first:
        files = {str(p.relative_to(work)): p.stat().st_size for p in sorted(work.rglob("*")) if p.is_file()}
        (work / "state.json").write_text(json.dumps(state | {"step": step, "ranks": ranks.size, "files": files}, indent=1))
        shutil.rmtree(final, ignore_errors=True)
        work.replace(final)
    ranks.barrier()
    return final


def steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in a run folder, oldest first."""
    found = (re.fullmatch(r"checkpoint-(\d+)", p.name) for p in folder.glob("checkpoint-*"))
    return sorted(int(m[1]) for m in found if m)


def broken(path: Path) -> str | None:
    """Why a checkpoint cannot be used, or None."""
    if not path.is_dir():
        return "there is no such folder"
    try:
        state = json.loads((path / "state.json").read_text())
        files = state["files"].items()
    except FileNotFoundError:
        return "state.json is missing (half-written?)"
    except (ValueError, LookupError, TypeError, AttributeError):
        return "state.json is not what was written (half-written?)"
    for name, size in files:
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes, {size} were written"
    return None


def open_folder(folder: Path, resume: str | bool | None, ranks: Ranks) -> Path | None:
    """Make the folder of a run; the checkpoint to go on from, if `resume` (a path, or True or auto for the newest) finds one.

    Raises ConfigError for a folder that holds another run or cannot be made.
    """
    found: Path | None = None
    if resume in (True, "auto"):
        found, problems = latest(folder)
        for problem in problems if ranks.first else ():
            print(f"ignored: {problem}")
    elif resume:
        found = Path(str(resume))
    elif any(ranks.gather((folder / "run.json").exists())):  # all ranks look before the first one writes
        raise ConfigError(f"{folder} holds another run: resume it (--resume auto) or choose another output_dir")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output_dir {folder} cannot be made: {error}") from None
    return found


def latest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest usable checkpoint of a run, and what was wrong with newer ones."""
    problems = []
    for step in reversed(steps(folder)):
        path = folder / f"checkpoint-{step}"
        why = broken(path)
        if why is None:
            return path, problems
        problems.append(f"{path}: {why}")
    return None, problems


def read(path: Path, ranks: Ranks, backend: str, config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(state, this rank's state) of a checkpoint; ConfigError if it is broken or belongs to another kind of run."""
    why = broken(path)
    if why:
        raise ConfigError(f"cannot resume from {path}: {why}")
    state = json.loads((path / "state.json").read_text())
    if state["ranks"] != ranks.size:
        raise ConfigError(f"cannot resume from {path}: it was written by {state['ranks']} ranks, this run has {ranks.size}")
    if state["backend"] != backend:
        raise ConfigError(
            f"cannot resume from {path}: it was written by {state['backend']}, this run has {backend}: set policy.backend"
        )
    now = json.loads(json.dumps(config))
    fixed = [{k: v for k, v in c.items() if k not in FREE_TO_CHANGE} for c in (filled(state["config"], now), now)]
    changed = changes(*fixed)
    if changed:
        raise ConfigError(
            f"cannot resume from {path}: {'; '.join(changed)}. Use another output_dir, or set the configuration back"
        )
    return state, torch.load(path / f"rank-{ranks.rank}.pt", weights_only=True)


def filled(config: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """The settings of an older version, with those of `now` that it did not know as they are by default: what it did."""
    usual = json.loads(json.dumps(to_dict(build({"model": "", "data": ""}))))
    if (config.get("policy") or {}).get("lora"):
        usual["policy"]["lora"] = {"use_dora": False, "new_tokens": False}

    def below(given: Any, default: Any, now: Any) -> Any:
        if not all(isinstance(side, dict) for side in (given, default, now)):
            return given
        new = {k: default[k] for k in now if k in default and k not in given}
        return {k: below(v, default.get(k), now.get(k)) for k, v in given.items()} | new

    return below(config, usual, now)


def rotate(folder: Path, keep: int, best: int | None) -> None:
    """Delete all but the newest `keep` checkpoints and the best one."""
    for step in steps(folder)[:-keep]:
        if step != best:
            shutil.rmtree(folder / f"checkpoint-{step}", ignore_errors=True)


def changes(old: Any, new: Any, name: str = "") -> list[str]:
    """What differs, field by field; a field that is missing counts as null (older versions have fewer)."""
    sides = [side if side is not None else {} for side in (old, new)]
    if old != new and all(isinstance(side, dict) for side in sides):
        keys = sorted({*sides[0], *sides[1]})
        return [x for k in keys for x in changes(sides[0].get(k), sides[1].get(k), f"{name}.{k}" if name else k)]
    return [] if old == new else [f"{name} was {old!r}, is {new!r}"]
