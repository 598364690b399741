"""What a comparison found: each method's numbers with intervals, paired differences, and the CSV file."""

from __future__ import annotations

import csv
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlpretrain.config import ConfigError
from rlpretrain.evaluation.intervals import interval
from rlpretrain.experiments.answer_parts import split_by_part
from rlpretrain.experiments.budgets import last_row, stages_of
from rlpretrain.experiments.experiment import BASE, Experiment, Job
from rlpretrain.experiments.measurements import Measurements
from rlpretrain.experiments.search import chosen_values, read_trials, trials
from rlpretrain.experiments.tasks import seed_means, task_numbers
from rlpretrain.files import finite, writing

HEADINGS = {
    "think_sampled": "thinks, sampled",
    "direct": "answers directly",
    "gain_frozen": "gain (nats)",
    "empty": "gain, empty",
    "shuffled": "gain, shuffled",
    "no_think_loss": "no-think loss",
}
"""The numbers of the table, each with the heading of its column."""
LOGGED = re.compile(r"eval(_averaged)?/(?!tasks/).*(loss|gain_frozen|direct|think_sampled)$")
"""What a run itself measured at its end (`eval.data`), of which the results have the mean over seeds."""
OWN_NUMBERS = ("asked", "reward", "gain_frozen", "no_think_loss")
"""A method's own number is the first of these that it has, unless its `own` names one."""


def read_evaluations(experiment: Experiment, name: str) -> list[dict[str, Any]]:
    """evaluation.json of each seed of a method, or of the base model."""
    folder = Path(experiment.output_dir)
    files = [folder / f"{name}-{seed}" / "evaluation.json" for seed in experiment.seeds]
    return [json.loads(file.read_text()) for file in files]


def read_measurements(experiment: Experiment) -> dict[str, Measurements]:
    """What the common evaluation measured, of the base model and of every method."""
    measured = {}
    for name in (BASE, *experiment.methods):
        evaluations = read_evaluations(experiment, name)
        common = [evaluation["common"] for evaluation in evaluations]
        measured[name] = Measurements(common, common[0]["rows"], evaluations[0].get("meta", {}))
    return measured


def collect(experiment: Experiment) -> dict[str, Any]:
    """Every number of every method, with its 95% interval and each seed's mean; paired differences; costs."""
    measured = read_measurements(experiment)
    methods: dict[str, Any] = {}
    for name, measurements in measured.items():
        numbers = [number for number in HEADINGS if measurements.has(number)]
        row: dict[str, Any] = {number: measurements.interval(number) for number in numbers}
        row["by_seed"] = {number: measurements.means(number) for number in numbers}
        if name != BASE:
            if experiment.evaluation.own:
                row["own"] = _own_number(experiment, name)
            row |= _cost(experiment, name)
            row |= _searched(experiment, name)
        methods[name] = row
    rows = measured[BASE].rows
    results = {
        "folder": str(Path(experiment.output_dir)),
        "seeds": list(experiment.seeds),
        "documents": len(rows),
        "source_rows": len(set(rows)),
        "methods": methods,
        "differences": _differences(measured, shown_pairs(experiment)),
        "shown_differences": [f"{one} - {other}" for one, other in shown_pairs(experiment)],
    }
    if experiment.evaluation.tasks or experiment.evaluation.pass_at:
        answers = _task_answers(experiment)
        results["tasks"] = task_numbers(answers, shown_pairs(experiment))
        results["tasks_by_seed"] = seed_means(answers)
    if experiment.evaluation.pass_at and experiment.evaluation.pass_at.by:
        parts = _parts(experiment)
        results["parts"] = {
            part: task_numbers(of_part, shown_pairs(experiment)) for part, of_part in parts.items()
        }
        results["parts_by_seed"] = {part: seed_means(of_part) for part, of_part in parts.items()}
    return finite(results)


def _task_answers(experiment: Experiment) -> dict[str, list[Any]]:
    """What `answer_tasks` and `sample_answers` returned, by model, for each seed."""
    return {
        name: [
            evaluation.get("tasks", {}) | evaluation.get("answers", {})
            for evaluation in read_evaluations(experiment, name)
        ]
        for name in (BASE, *experiment.methods)
    }


def _parts(experiment: Experiment) -> dict[str, Any]:
    """The sampled answers of each value of `pass_at.by`."""
    evaluations = {name: read_evaluations(experiment, name) for name in (BASE, *experiment.methods)}
    answers = {name: [each["answers"] for each in of_seeds] for name, of_seeds in evaluations.items()}
    return split_by_part(answers, evaluations[BASE][0]["parts"])


def _own_number(experiment: Experiment, name: str) -> dict[str, Any]:
    """A method's own number, of the base model (before) and of the trained one (after)."""
    after, before = (
        Measurements(own, own[0]["rows"])
        for own in (
            [evaluation["own"][name] for evaluation in read_evaluations(experiment, model)]
            for model in (name, BASE)
        )
    )
    number = experiment.methods[name].own or next(filter(after.has, OWN_NUMBERS))
    if not after.has(number):
        raise ConfigError(
            f"method {name}: own '{number}' is not one of its numbers: {', '.join(after.by_seed[0])}"
        )
    return {
        "number": number,
        "before": before.interval(number),
        "after": after.interval(number),
        "change": after.interval(number, before),
        "by_seed": after.means(number),
    }


def _cost(experiment: Experiment, name: str) -> dict[str, Any]:
    """What the runs of a method spent, how long they were and why they ended."""
    folders = [Path(experiment.output_dir) / f"{name}-{seed}" for seed in experiment.seeds]
    last_rows = [last_row(folder) for folder in folders]
    records = [json.loads((folder / "run.json").read_text()) for folder in folders]
    spent = {
        unit: float(np.mean([row[f"num_{unit}"] for row in last_rows]))
        for unit in ("input_tokens", "tokens", "flops")
    }
    if experiment.methods[name].after:
        jobs = [Job(experiment=experiment, name=name, seed=seed, where=Path()) for seed in experiment.seeds]
        rows = [[last_row(folder) for folder in stages_of(job)] for job in jobs]
        spent["flops_with_stages"] = float(np.mean([sum(row["num_flops"] for row in each) for each in rows]))
    found = {
        "spent": spent,
        "steps": [row["step"] for row in last_rows],
        "stopped": [record["stopped"] for record in records],
    }
    logged = {
        number: _over_seeds([row[number] for row in last_rows])
        for number in last_rows[0]
        if LOGGED.match(number) and all(row.get(number) is not None for row in last_rows)
    }
    return found | ({"logged": logged} if logged else {})


def _over_seeds(values: list[float]) -> list[float]:
    """[mean, low, high] over the seeds, then the value of each."""
    mean, ends = interval(np.array(values))
    return [mean, *ends, *values]


def _searched(experiment: Experiment, name: str) -> dict[str, Any]:
    """What a method's `search` tried and chose; operations are those of all trials together."""
    method = experiment.methods[name]
    job = Job(experiment=experiment, name=name, seed=experiment.seeds[0], where=Path())
    if not method.search:
        return {}
    spent = sum(last_row(trial.folder)["num_flops"] for trial in trials(job))
    found = {"by": method.search_by, "tried": read_trials(job), "chosen": chosen_values(job), "flops": spent}
    return {"search": found}


def shown_pairs(experiment: Experiment) -> list[tuple[str, str]]:
    """Whose paired differences are shown: each method and the base, the first, and those it is against."""
    first = next(iter(experiment.methods))
    pairs = []
    for name, method in experiment.methods.items():
        others = dict.fromkeys((BASE, first, *method.against))
        pairs += [(name, other) for other in others if other != name]
    return pairs


def _differences(
    measured: dict[str, Measurements], shown: Sequence[tuple[str, str]]
) -> dict[str, dict[str, list[float]]]:
    """{"a - b": {number: [mean, low, high]}} for every two models, at the same rows with the same seeds."""
    every = ((later, earlier) for earlier, later in itertools.combinations(measured, 2))
    differences = {}
    for first, second in dict.fromkeys((*every, *shown)):
        one, other = measured[first], measured[second]
        shared = [number for number in HEADINGS if one.has(number) and other.has(number)]
        differences[f"{first} - {second}"] = {number: one.interval(number, other) for number in shared}
    return differences


def write_csv(path: Path, results: dict[str, Any]) -> None:
    """A line for each method (or difference of two) and number: mean, low, high, and each seed's mean."""
    work = path.with_name(f".{path.name}.tmp")
    with writing(path), work.open("w", newline="") as file:
        out = csv.writer(file)
        seeds = [f"seed {seed}" for seed in results["seeds"]]
        out.writerow(("method", "number", "mean", "low", "high", *seeds))
        for name, row in results["methods"].items():
            for number in HEADINGS:
                if number in row:
                    out.writerow((name, number, *row[number], *row["by_seed"][number]))
            if "own" in row:
                for when in ("before", "after"):
                    out.writerow((name, f"own {row['own']['number']}, {when}", *row["own"][when]))
            for number, values in row.get("logged", {}).items():
                out.writerow((name, number, *values))
            for unit, mean in row.get("spent", {}).items():
                out.writerow((name, unit, mean, "", ""))
        for pair, row in results["differences"].items():
            out.writerows((pair, number, *values) for number, values in row.items())
        if "tasks" in results:
            out.writerows(_answer_lines(results["tasks"], results["tasks_by_seed"]))
        for part, numbers in results.get("parts", {}).items():
            out.writerows(_answer_lines(numbers, results["parts_by_seed"][part], f"{part}: "))
    work.replace(path)


def _answer_lines(numbers: Mapping[str, Any], by_seed: Mapping[str, Any], part: str = "") -> Iterator[Any]:
    """Lines of the file: differences have no means of seeds."""
    for name, row in numbers.items():
        for number, values in row.items():
            yield name, f"{part}{number}", *values, *by_seed.get(name, {}).get(number, ())
