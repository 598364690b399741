"""On resume, move everything that the run wrote after the checkpoint to a folder of its own.

Two branches of a run never mix.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from rlpretrain.training import checkpoint
from rollout.folders import free_name, now

STEP_FILE = re.compile(r"step-(\d+)-rank-\d+\..+")


def set_aside(folder: Path, step: int, resumed_from: Path | None) -> str | None:
    """Move everything that the run in `folder` wrote after `step` to `folder`/abandoned-<time>.

    A checkpoint is moved if its step is later, or if it was written after `resumed_from`. One process calls
    it, before the first step. Returns a line that says what was moved; None if there was nothing to move.
    """
    checkpoints = [path for path in checkpoint.by_age(folder) if _is_later(path, step, resumed_from)]
    files = [*_later_files(folder / "rollouts", step), *_later_files(folder / "nonfinite", step)]
    models = []
    if _last_step(folder) > step:
        models = [path for path in (folder / "model", folder / "adapter") if path.is_dir()]
    log = folder / "metrics.jsonl"
    kept, later = _split_log(log, step)
    if not (checkpoints or files or models or later):
        return None
    aside = free_name(folder / f"abandoned-{now()}")
    aside.mkdir()
    for path in [*reversed(checkpoints), *models, *files]:
        (aside / path.relative_to(folder)).parent.mkdir(exist_ok=True)
        path.rename(aside / path.relative_to(folder))
    if later:
        (aside / log.name).write_text("".join(line + "\n" for line in later))
        work = log.with_name(f".{log.name}.tmp")
        work.write_text("".join(line + "\n" for line in kept))
        work.replace(log)
    if (folder / "run.json").is_file():
        shutil.copyfile(folder / "run.json", aside / "run.json")
    moved = [path.name for path in [*checkpoints, *models]]
    if later:
        moved.append(f"{len(later)} lines of metrics.jsonl")
    if files:
        moved.append(f"{len(files)} files of steps")
    return f"moved what the run wrote after step {step} to {aside}: {', '.join(moved)}"


def _is_later(path: Path, step: int, resumed_from: Path | None) -> bool:
    """Whether a checkpoint was written after the one that the run resumes from."""
    if int(path.name.split("-")[1]) > step:
        return True
    if resumed_from is None or resumed_from.resolve().parent != path.resolve().parent:
        return False
    return checkpoint.written(path) > checkpoint.written(resumed_from)


def _later_files(folder: Path, step: int) -> Iterator[Path]:
    """Files of later steps, as of rollouts and of batches with NaN."""
    for file in sorted(folder.glob("step-*")):
        match = STEP_FILE.fullmatch(file.name)
        if match and int(match[1]) > step:
            yield file


def _last_step(folder: Path) -> int:
    """The step at which run.json was written last; 0 if there is no readable run.json."""
    try:
        return int(json.loads((folder / "run.json").read_text())["step"])
    except (OSError, ValueError, LookupError, TypeError):
        return 0


def _split_log(log: Path, step: int) -> tuple[list[str], list[str]]:
    """The lines of metrics.jsonl up to `step`, and those after it; an incomplete line counts as later."""
    kept: list[str] = []
    later: list[str] = []
    for line in log.read_text(errors="replace").splitlines() if log.is_file() else ():
        try:
            (kept if json.loads(line)["step"] <= step else later).append(line)
        except (ValueError, LookupError, TypeError):
            later.append(line)
    return kept, later
