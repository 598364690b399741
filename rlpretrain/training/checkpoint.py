"""Checkpoints that resume bit-identically.

They are written under a temporary name and renamed, checked before they are read, and rotated.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rlpretrain.config import ConfigError
from rlpretrain.files import CannotWrite, check_writable, dumps, writing
from rlpretrain.ranks import Ranks
from rlpretrain.training.same_settings import check_same
from rollout.folders import MARK, begin_folder, finish_folder


def save(
    folder: Path,
    step: int,
    ranks: Ranks,
    parts: Mapping[str, Any],
    state: dict[str, Any],
    rank_state: dict[str, Any],
) -> Path:
    """Write `folder`/checkpoint-<step> completely or not at all.

    `parts` are objects with `save(path)`; `state` is the same on all ranks, `rank_state` differs by rank.
    state.json, with the sizes of all files, is written last; then the folder is renamed.
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
                paths = [path for path in sorted(work.rglob("*")) if path.is_file()]
                files = {str(path.relative_to(work)): path.stat().st_size for path in paths}
                facts = {"step": step, "ranks": ranks.size, "written": time.time(), "files": files}
                (work / "state.json").write_text(dumps(state | facts, indent=1))
                if is_ours(final):
                    (final / MARK).touch()  # older versions wrote no mark
                finish_folder(work, final)
    except CannotWrite as error:
        if ranks.first:
            shutil.rmtree(work, ignore_errors=True)
        newest, _ = latest(folder)
        held = f"The newest whole checkpoint is {newest}" if newest else "There is no checkpoint yet"
        raise CannotWrite(f"{error}. {held}: make room, then go on with --resume auto") from None
    ranks.barrier()
    return final


def is_ours(path: Path) -> bool:
    """Whether `save` wrote a folder; other trainers use names like checkpoint-<step> too."""
    try:
        state = json.loads((path / "state.json").read_text())
        return isinstance(state["files"], dict) and "step" in state
    except (OSError, ValueError, LookupError, TypeError):
        return False


def steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in a run folder, oldest first."""
    matches = [re.fullmatch(r"checkpoint-(\d+)", path.name) for path in folder.glob("checkpoint-*")]
    return sorted(int(match[1]) for match in matches if match)


def written(path: Path) -> float:
    """When a checkpoint was written, in seconds since 1970."""
    try:
        return float(json.loads((path / "state.json").read_text())["written"])
    except (OSError, ValueError, LookupError, TypeError):  # an older version wrote it, or it is broken
        state = path / "state.json"
        return (state if state.is_file() else path).stat().st_mtime


def by_age(folder: Path) -> list[Path]:
    """The checkpoints in a run folder, in the order in which they were written.

    The order of their steps may differ, if a run resumed from an older checkpoint.
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
        return "state.json is damaged (half-written?)"
    for name, size in files:
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes, {size} were written"
    return None


def open_folder(folder: Path, resume: str | bool | None, ranks: Ranks) -> Path | None:
    """Make the folder of a run, and return the checkpoint to resume from, or None.

    `resume` is a path, or True or "auto" for the newest usable checkpoint. Raises ConfigError for a folder
    that holds another run or cannot be made.
    """
    checkpoint: Path | None = None
    has_run = any(ranks.gather(holds_run(folder)))  # all ranks look before the first one writes
    if resume in (True, "auto"):
        checkpoint, problems = latest(folder)
        for problem in problems if ranks.first else ():
            print(f"ignored: {problem}")
    elif resume:
        checkpoint = Path(str(resume)).expanduser()
        if problem := broken(checkpoint):
            raise ConfigError(f"cannot resume from {checkpoint}: {problem}")
        if has_run and checkpoint.resolve().parent != folder.resolve():
            raise ConfigError(
                f"cannot resume from {checkpoint}: output_dir {folder} holds another run, and the two would "
                "mix. Choose a new output_dir to branch off, or resume from a checkpoint of this folder "
                "(--resume auto)"
            )
    elif has_run:
        raise ConfigError(
            f"{folder} holds another run: resume it (--resume auto) or choose another output_dir"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output_dir {folder} cannot be made: {error}") from None
    if ranks.first:
        check_writable(folder, "output_dir")
    return checkpoint


def holds_run(folder: Path) -> bool:
    """Whether a folder has a run's log, run.json or checkpoint."""
    if (folder / "run.json").exists() or (folder / "metrics.jsonl").exists():
        return True
    return any(is_ours(path) for path in folder.glob("checkpoint-*"))


def latest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest usable checkpoint of a run, and the problems of newer ones."""
    problems = []
    for path in reversed(by_age(folder)):
        problem = broken(path)
        if problem is None:
            return path, problems
        problems.append(f"{path}: {problem}")
    return None, problems


def read(
    path: Path, ranks: Ranks, backend: str, config: dict[str, Any], any_ranks: bool = False
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(state, states of ranks) of a checkpoint: this rank's, or if their number differs those of all ranks.

    Raises ConfigError if it is broken, or if this run's backend, configuration, or, without `any_ranks`,
    number of ranks differ.
    """
    problem = broken(path)
    if problem:
        raise ConfigError(f"cannot resume from {path}: {problem}")
    state = json.loads((path / "state.json").read_text())
    if state["backend"] != backend:
        raise ConfigError(
            f"cannot resume from {path}: it was written by {state['backend']}, this run has {backend}: set "
            "policy.backend"
        )
    wrote = state["ranks"]
    if wrote != ranks.size and not any_ranks:
        raise ConfigError(
            f"cannot resume from {path}: it was written by {wrote} ranks, this run has {ranks.size}, and "
            f"{backend} keeps state that cannot be dealt again: use {wrote} ranks, or policy.backend fsdp "
            "or torch from the start"
        )
    check_same(state["config"], config, path)
    files = [path / f"rank-{rank}.pt" for rank in ([ranks.rank] if wrote == ranks.size else range(wrote))]
    for file in files:
        if not file.is_file():
            raise ConfigError(f"cannot resume from {path}: {file.name} is missing")
    return state, [torch.load(file, weights_only=True) for file in files]


def rotate(folder: Path, keep: int, best: int | None) -> None:
    """Delete our checkpoints, except the `keep` that were written last and the best one."""
    ours = [path for path in by_age(folder) if is_ours(path)]
    for path in ours[:-keep]:
        if path.name != f"checkpoint-{best}":
            shutil.rmtree(path)
