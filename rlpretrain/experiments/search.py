"""Choosing a method's values by trials: `search` of an experiment file."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any, TypedDict

import numpy as np

from rlpretrain.config import ConfigError
from rlpretrain.experiments.experiment import Job, combinations
from rlpretrain.experiments.measurements import Measurements


class Trial(TypedDict):
    """What one combination of values reached on the search documents."""

    values: dict[str, Any]
    score: float


def trials(job: Job) -> list[Job]:
    """A training for each combination, with the first seed, evaluated on the search documents alone."""
    if job.method is None or job.trial is not None:
        return []
    evaluation = job.experiment.evaluation
    if evaluation.search_data is not None:
        evaluation = replace(evaluation, data=evaluation.search_data, own=False, tasks=(), pass_at=None)
    experiment = replace(job.experiment, evaluation=evaluation)
    seed = experiment.seeds[0]
    return [
        replace(job, experiment=experiment, seed=seed, trial=place)
        for place in range(len(combinations(job.method)))
    ]


def read_trials(job: Job) -> list[Trial]:
    """The scores of a method's trials, all of which are done."""
    method = job.method
    if method is None or not method.search:
        return []
    scored = zip(combinations(method), trials(job), strict=True)
    return [{"values": values, "score": _score(trial, method.search_by)} for values, trial in scored]


def _score(trial: Job, number: str) -> float:
    """The mean of a number over the positions, as in the tables."""
    common = json.loads((trial.folder / "evaluation.json").read_text())["common"]
    measured = Measurements([common], common["rows"])
    if not measured.has(number):
        raise ConfigError(f"method {trial.name}: search_by '{number}' is not one of {', '.join(common)}")
    return measured.means(number)[0]


def chosen_values(job: Job) -> dict[str, Any]:
    """The combination that a job trains with: its own if it is a trial, else the best of the trials."""
    method = job.method
    if method is None or not method.search:
        return {}
    if job.trial is not None:
        return combinations(method)[job.trial]
    # A number that is not finite is worse than any other.
    sign = -1.0 if method.search_by.endswith("loss") else 1.0
    scores = [sign * trial["score"] for trial in read_trials(job)]
    best = int(np.argmax(np.nan_to_num(scores, nan=-np.inf, neginf=-np.inf)))
    return combinations(method)[best]


def describe_values(values: dict[str, Any]) -> str:
    """For a line of the console.

    >>> describe_values({"optim.lr": 1e-05, "max_steps": 5})
    'optim.lr 1e-05, max_steps 5'
    """
    return ", ".join(f"{name} {value}" for name, value in values.items())
