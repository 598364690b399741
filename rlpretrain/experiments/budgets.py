"""What the runs of an experiment have spent, and what is left of a matched budget."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from rlpretrain.config import ConfigError
from rlpretrain.experiments.experiment import Job


def budget_left(job: Job, like: Job) -> float:
    """Tokens or operations of the run of `like` that are left to a job.

    ConfigError if the job's earlier stages have spent them.
    """
    method = job.experiment.methods[job.name]
    unit = "num_input_tokens" if method.match == "tokens" else "num_flops"
    if not method.with_stages:
        return last_row(like.folder)[unit]
    total = sum(last_row(folder)[unit] for folder in stages_of(like))
    before = sum(last_row(folder)[unit] for folder in stages_of(job)[:-1])
    if before >= total:
        raise ConfigError(
            f"its earlier stages have spent {before:.4g} {unit[4:]}, and the budget, that of "
            f"{like.name} with its stages, is {total:.4g}: shorten the stages, or match another"
        )
    return total - before


def stages_of(job: Job) -> list[Path]:
    """The run folders of a job's earlier stages, the first one first, and its own."""
    method = job.experiment.methods[job.name]
    earlier = stages_of(replace(job, name=method.after, trial=None)) if method.after else []
    return [*earlier, job.folder]


def planned_steps(folder: Path) -> int:
    """The steps over which a run's schedule went; it may have ended before."""
    return json.loads((folder / "run.json").read_text())["total_steps"]


def last_row(folder: Path) -> dict[str, float]:
    """The last line of a run's log."""
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
