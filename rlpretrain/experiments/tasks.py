"""Benchmarks in a comparison: every model answers the same tasks, directly and after a thought."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlpretrain.config import PretrainConfig
from rlpretrain.evaluation.harness import load_tasks, run_tasks
from rlpretrain.evaluation.intervals import interval
from rlpretrain.evaluation.task_results import WAYS
from rlpretrain.experiments.evaluated_model import load_evaluated
from rlpretrain.experiments.experiment import BASE, Job
from rlpretrain.objectives import load_objective

Answers = Mapping[str, Mapping[str, Any]]
"""What `answer_tasks` returned for each seed."""


def answer_tasks(job: Job, config: PretrainConfig, path: str) -> dict[str, Any]:
    """The numbers of the model at `path`: {"task/metric, way": {"value", "examples"}}.

    `config` has the common objective. `examples` has the metric of each example, and is null if the number
    is no mean over examples.
    """
    evaluation = job.experiment.evaluation
    model, tokenizer = load_evaluated(job, config, path)
    results = run_tasks(
        model,
        tokenizer,
        load_tasks(evaluation.tasks, evaluation.include_path),
        objective=load_objective(config, tokenizer),
        examples=evaluation.task_examples,
        batch_size=evaluation.task_batch,
        seed=job.seed,
        quiet=True,
    )
    return {
        f"{name}, {way}": {
            "value": number.value,
            "examples": None if number.examples is None else number.examples.tolist(),
        }
        for way in WAYS
        for name, number in getattr(results, way).items()
    }


def task_numbers(
    measured: Mapping[str, Sequence[Answers]], pairs: Sequence[tuple[str, str]]
) -> dict[str, Any]:
    """[mean, low, high] of each model and number, and of the paired difference of each two models of `pairs`.

    `measured` has the answers of each seed by model. Intervals are over examples and seeds.
    """
    names = list(measured)
    numbers = list(measured[BASE][0])
    out: dict[str, Any] = {
        name: {number: _interval(_values(measured[name], number)) for number in numbers} for name in names
    }
    for name, other in pairs:
        out[f"{name} - {other}"] = {
            number: _interval(_values(measured[name], number) - _values(measured[other], number))
            for number in numbers
        }
    return out


def seed_means(measured: Mapping[str, Sequence[Answers]]) -> dict[str, dict[str, list[float]]]:
    """{model: {number: the mean of each seed}}."""
    return {
        name: {number: _values(by_seed, number).mean(axis=1).tolist() for number in by_seed[0]}
        for name, by_seed in measured.items()
    }


def _values(by_seed: Sequence[Answers], number: str) -> np.ndarray:
    """[seeds, examples]; one column with the number itself if it is no mean over examples."""
    answers = [of_seed[number] for of_seed in by_seed]
    return np.array([answer["examples"] or [answer["value"]] for answer in answers], float)


def _interval(values: np.ndarray) -> list[float]:
    mean, ends = interval(values)
    return [mean, *ends]
