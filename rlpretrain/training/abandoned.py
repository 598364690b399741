"""Going on from a checkpoint: what the run wrote after it is moved to a folder of its own, so that two
branches never mix.
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
    """Move everything that the run in `folder` wrote after `step` to `folder`/abandoned-<time>; what that
    was, in a line.

    Checkpoints come after the point of resumption if their step does, or if they were written later. One
    process calls it, before the first step. None if there is nothing to move.
    """
    checkpoints = [path for path in checkpoint.by_age(folder) if _is_later(path, step, resumed_from)]
    files = [file for name in ("rollouts", "nonfinite") for file in _later_files(folder / name, step)]
    models = [
        folder / name
        for name in ("model", "adapter")
        if (folder / name).is_dir() and _last_step(folder) > step
    ]
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
    parts = [", ".join(path.name for path in [*checkpoints, *models])]
    parts += [
        f"{len(later)} lines of metrics.jsonl" if later else "",
        f"{len(files)} files of steps" if files else "",
    ]
    return f"what came after step {step} is set aside in {aside}: {', '.join(filter(None, parts))}"


def _is_later(path: Path, step: int, resumed_from: Path | None) -> bool:
    """Whether a checkpoint came after the one that the run goes on from."""
    if int(path.name.split("-")[1]) > step:
        return True
    if resumed_from is None or resumed_from.resolve().parent != path.resolve().parent:
        return False
    return checkpoint.written(path) > checkpoint.written(resumed_from)


def _later_files(folder: Path, step: int) -> Iterator[Path]:
    """Rollouts and batches of later steps."""
    for file in sorted(folder.glob("step-*")):
        found = STEP_FILE.fullmatch(file.name)
        if found and int(found[1]) > step:
            yield file


def _last_step(folder: Path) -> int:
    """The step at which run.json was written last; 0 if it is not there."""
    try:
        return int(json.loads((folder / "run.json").read_text())["step"])
    except (OSError, ValueError, LookupError, TypeError):
        return 0


def _split_log(log: Path, step: int) -> tuple[list[str], list[str]]:
    """The lines of metrics.jsonl up to `step`, and those after it; half a line counts as later."""
    kept: list[str] = []
    later: list[str] = []
    for line in log.read_text(errors="replace").splitlines() if log.is_file() else ():
        try:
            (kept if json.loads(line)["step"] <= step else later).append(line)
        except (ValueError, LookupError, TypeError):
            later.append(line)
    return kept, later
