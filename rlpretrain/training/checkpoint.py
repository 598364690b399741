"""Checkpoints that resume bit-identically: written aside and renamed, checked before they are read,
rotated.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from rlpretrain.config import ConfigError
from rlpretrain.config.engines import own_settings
from rlpretrain.config.io import build, to_dict
from rlpretrain.files import CannotWrite, check_writable, dumps, writing
from rlpretrain.ranks import Ranks
from rollout.folders import MARK, begin_folder, finish_folder

MACHINE = (
    "output_dir",
    "console",
    "log_every",
    "report_to",
    "push_to_hub",
    "threads",
    "device",
    "save_rollouts",
    "engine.urls",
    "engine.token_file",
    "engine.weights_dir",
    "engine.transfer",
    "engine.master_address",
    "engine.concurrency",
    "engine.request_timeout",
    "engine.deadline",
    "engine.num_engines",
    "engine.resources",
    "engine.strategy",
    "engine.address",
    "engine.kv_cache_gib",
    "engine.gpu_memory_utilization",
    "engine.sleep",
    "engine.probe_tolerance",
    "baseline.cache_tokens",
)
"""Settings that say where a run runs and what it tells, and decide none of its numbers: machines move."""
FREE_TO_CHANGE = (*MACHINE, "max_steps", "epochs", "checkpoint", "eval", "stop")
"""Settings that may differ between a checkpoint and the run that resumes from it."""


def save(
    folder: Path,
    step: int,
    ranks: Ranks,
    parts: Mapping[str, Any],
    state: dict[str, Any],
    rank_state: dict[str, Any],
) -> Path:
    """Write `folder`/checkpoint-<step> whole or not at all.

    `parts` are objects with `save(path)`; `state` is the same on all ranks, `rank_state` is each rank's own.
    The list of files with their sizes goes into state.json, last; then the folder gets its name.
    """
    final, work = folder / f"checkpoint-{step}", folder / f".checkpoint-{step}.tmp"
    try:
        with writing(final):
            if ranks.first:
                begin_folder(final)
            ranks.barrier()
            for part in parts.values():
                part.save(work)
            torch.save(rank_state, work / f"rank-{ranks.rank}.pt")
            ranks.barrier()
            if ranks.first:
                files = {
                    str(p.relative_to(work)): p.stat().st_size for p in sorted(work.rglob("*")) if p.is_file()
                }
                facts = {"step": step, "ranks": ranks.size, "written": time.time(), "files": files}
                (work / "state.json").write_text(dumps(state | facts, indent=1))
                if is_ours(final):
                    (final / MARK).touch()  # one of an older version
                finish_folder(work, final)
    except CannotWrite as error:
        if ranks.first:
            shutil.rmtree(work, ignore_errors=True)
        newest, _ = latest(folder)
        held = f"the newest whole checkpoint is {newest}" if newest else "there is no checkpoint yet"
        raise CannotWrite(f"{error}. {held}: make room, then go on with --resume auto") from None
    ranks.barrier()
    return final


def is_ours(path: Path) -> bool:
    """Whether a folder is a checkpoint that `save` wrote; other trainers call theirs checkpoint-<step>
    too.
    """
    try:
        state = json.loads((path / "state.json").read_text())
        return isinstance(state["files"], dict) and "step" in state
    except (OSError, ValueError, LookupError, TypeError):
        return False


def steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in a run folder, oldest first."""
    found = (re.fullmatch(r"checkpoint-(\d+)", p.name) for p in folder.glob("checkpoint-*"))
    return sorted(int(m[1]) for m in found if m)


def written(path: Path) -> float:
    """When a checkpoint was written, in seconds since 1970."""
    try:
        return float(json.loads((path / "state.json").read_text())["written"])
    except (OSError, ValueError, LookupError, TypeError):  # of an older version, or broken
        state = path / "state.json"
        return (state if state.is_file() else path).stat().st_mtime


def by_age(folder: Path) -> list[Path]:
    """The checkpoints in a run folder, the one written last at the end: numbers begin again where a run goes
    on from an older one.
    """
    paths = [folder / f"checkpoint-{step}" for step in steps(folder)]
    return sorted(paths, key=written)


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
    """Make the folder of a run; the checkpoint to go on from, if `resume` (a path, or True or auto for the
    newest) finds one.

    Raises ConfigError for a folder that holds another run or cannot be made.
    """
    found: Path | None = None
    there = any(ranks.gather(holds_run(folder)))  # all ranks look before the first one writes
    if resume in (True, "auto"):
        found, problems = latest(folder)
        for problem in problems if ranks.first else ():
            print(f"ignored: {problem}")
    elif resume:
        found = Path(str(resume)).expanduser()
        if why := broken(found):
            raise ConfigError(f"cannot resume from {found}: {why}")
        if there and found.resolve().parent != folder.resolve():
            raise ConfigError(
                f"cannot resume from {found}: output_dir {folder} holds another run, and the two would mix. "
                "Choose a new output_dir to branch off there, or go on with a checkpoint of this folder "
                "(--resume auto)"
            )
    elif there:
        raise ConfigError(
            f"{folder} holds another run: resume it (--resume auto) or choose another output_dir"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output_dir {folder} cannot be made: {error}") from None
    if ranks.first:
        check_writable(folder, "output_dir")
    return found


def holds_run(folder: Path) -> bool:
    """Whether a folder has anything of a run in it."""
    return any((folder / name).exists() for name in ("run.json", "metrics.jsonl")) or any(
        is_ours(path) for path in folder.glob("checkpoint-*")
    )


def latest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest usable checkpoint of a run, and what was wrong with newer ones."""
    problems = []
    for path in reversed(by_age(folder)):
        why = broken(path)
        if why is None:
            return path, problems
        problems.append(f"{path}: {why}")
    return None, problems


def read(
    path: Path, ranks: Ranks, backend: str, config: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(state, this rank's state) of a checkpoint; ConfigError if it is broken or belongs to another kind
    of run.
    """
    why = broken(path)
    if why:
        raise ConfigError(f"cannot resume from {path}: {why}")
    state = json.loads((path / "state.json").read_text())
    if state["ranks"] != ranks.size:
        raise ConfigError(
            f"cannot resume from {path}: it was written by {state['ranks']} ranks, this run has {ranks.size}"
        )
    if state["backend"] != backend:
        raise ConfigError(
            f"cannot resume from {path}: it was written by {state['backend']}, this run has {backend}: set "
            "policy.backend"
        )
    check_same(state["config"], config, path)
    return state, torch.load(path / f"rank-{ranks.rank}.pt", weights_only=True)


def check_same(before: dict[str, Any], config: dict[str, Any], where: Path) -> None:
    """Raise ConfigError unless a run of `config` may go on with what one of the settings `before` left at
    `where`.
    """
    now = json.loads(json.dumps(config))
    known = before | {"engine": own_settings(before["engine"])} if "engine" in before else before
    changed = changes(without(filled(known, now), FREE_TO_CHANGE), without(now, FREE_TO_CHANGE))
    if changed:
        raise ConfigError(
            f"cannot resume from {where}: {'; '.join(changed)}. Use another output_dir, or set the "
            "configuration back"
        )


def without(config: dict[str, Any], fields: Sequence[str]) -> dict[str, Any]:
    """A configuration less some of its fields, `section` or `section.field`."""
    left = {k: dict(v) if isinstance(v, dict) else v for k, v in config.items() if k not in fields}
    for section, _, field in (name.partition(".") for name in fields if "." in name):
        if isinstance(left.get(section), dict):
            left[section].pop(field, None)
    return left


def filled(config: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """The settings of an older version, with those of `now` that it did not know as they are by default:
    what it did.
    """
    engine = (now.get("engine") or {}).get("name", "hf")
    usual = json.loads(json.dumps(to_dict(build({"model": "", "data": "", "engine": engine}))))
    if (config.get("policy") or {}).get("lora"):
        usual["policy"]["lora"] = {"use_dora": False, "new_tokens": False}

    def below(given: Any, default: Any, now: Any) -> Any:
        if not all(isinstance(side, dict) for side in (given, default, now)):
            return given
        new = {k: default[k] for k in now if k in default and k not in given}
        return {k: below(v, default.get(k), now.get(k)) for k, v in given.items()} | new

    return below(config, usual, now)


def rotate(folder: Path, keep: int, best: int | None) -> None:
    """Delete all but the `keep` checkpoints that were written last and the best one; never one that is not
    ours.
    """
    for path in [p for p in by_age(folder) if is_ours(p)][:-keep]:
        if path.name != f"checkpoint-{best}":
            shutil.rmtree(path)


def changes(old: Any, new: Any, name: str = "") -> list[str]:
    """What differs, field by field; a field that is missing counts as null (older versions have fewer)."""
    sides = [side if side is not None else {} for side in (old, new)]
    if old != new and all(isinstance(side, dict) for side in sides):
        keys = sorted({*sides[0], *sides[1]})
        return [
            x for k in keys for x in changes(sides[0].get(k), sides[1].get(k), f"{name}.{k}" if name else k)
        ]
    return [] if old == new else [f"{name} was {old!r}, is {new!r}"]
