"""`rlpretrain compare`: methods and seeds from one base model with matched budgets, in one table and a plot.

Each training is a run folder and a process of its own. Finished parts are kept, so an interrupted comparison
continues where it stopped. Every model is evaluated twice on the same held-out documents: by one common
objective, which compares the methods, and by its own against the base model, which shows whether it learned
what it was rewarded for. All methods are evaluated on the same rows with the same seeds, so paired
differences have narrower intervals than the numbers themselves.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from rlpretrain import models
from rlpretrain.config import ConfigError
from rlpretrain.evaluation.harness import load_tasks
from rlpretrain.experiments.curves import plot_curves
from rlpretrain.experiments.experiment import BASE, Experiment, Job
from rlpretrain.experiments.held_out import read_held_out
from rlpretrain.experiments.jobs import Say, all_jobs, common_config, run_experiment
from rlpretrain.experiments.loading import build_experiment, load_experiment
from rlpretrain.experiments.plot import plot, plot_parts
from rlpretrain.experiments.results import Measurements, collect, read_measurements, write_csv
from rlpretrain.experiments.sampled_answers import check_answers, check_parts
from rlpretrain.experiments.tables import differences, logged, part_tables, searches, table, tasks
from rlpretrain.files import check_writable
from rlpretrain.models import adapters
from rlpretrain.objectives import delimiters, load_objective
from rlpretrain.prompts import ensure_delimiters
from rlpretrain.training.records import write_json

__all__ = [
    "BASE",
    "Experiment",
    "Measurements",
    "build_experiment",
    "check",
    "collect",
    "compare",
    "differences",
    "load_experiment",
    "logged",
    "part_tables",
    "read_measurements",
    "run",
    "searches",
    "table",
    "tasks",
]


def compare(path: str | Path, *, jobs: int | None = None, say: Say = print) -> dict[str, Any]:
    """Train and evaluate what is not done, write the results and return them; `jobs` replaces the file's."""
    path = Path(path).expanduser()
    experiment = load_experiment(path)
    experiment = replace(experiment, jobs=jobs) if jobs else experiment
    run(experiment, path.parent, say=say)
    results = collect(experiment)
    folder = Path(experiment.output_dir)
    write_json(folder / "results.json", results)
    write_csv(folder / "results.csv", results)
    try:
        plot(results, folder / "results.svg")
        plot_curves(experiment, folder / "curves.svg")
        if parts := results.get("parts"):
            plot_parts(parts, list(results["methods"]), folder / "answers.svg")
    except ImportError:
        say('no plot: pip install "rlpretrain[plot]"')
        return results | {"plotted": False}
    return results | {"plotted": True}


def run(experiment: Experiment, where: Path, *, say: Say = print) -> None:
    """Check an experiment, then train and evaluate what is not done.

    `where` is the folder of the methods' files. The measurements stand in the run folders afterwards:
    `read_measurements` returns them, `collect` their means with intervals.
    """
    check_writable(experiment.output_dir, "output_dir")
    evaluations = [job.folder / "evaluation.json" for job in all_jobs(experiment, where)]
    if not all(file.exists() for file in evaluations):
        check(experiment, where)
    run_experiment(experiment, where, say)


def check(experiment: Experiment, where: Path) -> None:
    """Make every objective with its tokenizer and read the held-out documents, before any training.

    Raises ConfigError that names the method, or `evaluation`.
    """
    evaluation, seed = experiment.evaluation, experiment.seeds[0]
    configs = {
        f"method {name}": Job(experiment=experiment, name=name, seed=seed, where=where).config()
        for name in experiment.methods
    }
    common = common_config(next(iter(configs.values())), evaluation)
    for part, config in (configs | {"evaluation": common}).items():
        tokenizer = models.load_tokenizer(config.model)
        ensure_delimiters(tokenizer, None, delimiters(config.objective))
        try:
            adapters.check(config)
            load_objective(config, tokenizer)
        except ConfigError as error:
            raise ConfigError(f"{part}: {error}") from None
    tokenizer = models.load_tokenizer(common.model)
    check_answers(evaluation)
    for data in filter(None, (evaluation.data, evaluation.search_data)):
        documents = read_held_out(data, tokenizer, limit=evaluation.documents, seed=evaluation.sample_seed)
        check_parts(evaluation, documents)
    if evaluation.tasks:
        load_tasks(evaluation.tasks, evaluation.include_path)
