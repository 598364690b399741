"""Runs the jobs of an experiment, in processes or on Ray: each trains and evaluates what is not done yet."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rlpretrain import models
from rlpretrain.config import ConfigError, PretrainConfig, TaskSettings
from rlpretrain.config.engines import own_settings
from rlpretrain.config.io import build, to_dict
from rlpretrain.evaluation.evaluate import evaluate
from rlpretrain.experiments.budgets import budget_left, last_row, planned_steps
from rlpretrain.experiments.evaluated_model import load_evaluated
from rlpretrain.experiments.experiment import BASE, CommonEvaluation, Experiment, Job, needed
from rlpretrain.experiments.held_out import read_held_out
from rlpretrain.experiments.sampled_answers import sample_answers
from rlpretrain.experiments.search import chosen_values, describe_values, trials
from rlpretrain.experiments.tasks import answer_tasks
from rlpretrain.objectives import delimiters, load_objective
from rlpretrain.ranks import join
from rlpretrain.tracking.progress import bar
from rlpretrain.training.pretrainer import Pretrainer
from rlpretrain.training.records import write_json
from rlpretrain.training.same_settings import MACHINE, changes, filled, without

Say = Callable[[str], None]
EARLIER_EVALUATION = {
    "greedy": False,
    "own": True,
    "pass_at": None,
    "positions": 1,
    "sample_seed": None,
    "search_data": None,
} | to_dict(TaskSettings())
"""What an evaluation did before these fields existed."""


def run_experiment(experiment: Experiment, where: Path, say: Say = print) -> None:
    """Train every method with every seed and evaluate it, and the base model, as far as that is not done.

    `where` is the folder of the methods' files; `say` gets a line for each job. A method that needs other
    runs (a budget, trials, a first stage) starts after those. Raises the first failure, once the jobs under
    way have ended.
    """
    jobs = all_jobs(experiment, where)
    stages = {stage_of(job) for job in jobs}
    for stage in sorted(stages):
        run_jobs(experiment, [job for job in jobs if stage_of(job) == stage], say)


def all_jobs(experiment: Experiment, where: Path) -> list[Job]:
    """Every method and the base model with every seed, behind the trials of the methods that search."""
    named = [
        Job(experiment=experiment, name=name, seed=seed, where=where)
        for seed in experiment.seeds
        for name in (*experiment.methods, BASE)
    ]
    first = [job for job in named if job.seed == experiment.seeds[0]]
    return [trial for job in first for trial in trials(job)] + named


def stage_of(job: Job) -> int:
    """0 if the job needs no other run, else one more than the latest of those it needs."""
    if job.method is None:
        return 0
    runs = [replace(job, name=name, trial=None) for name in needed(job.method)]
    return max((1 + stage_of(run) for run in (*runs, *trials(job))), default=0)


def run_jobs(experiment: Experiment, jobs: Sequence[Job], say: Say) -> None:
    """Run jobs that do not need each other."""
    pending = []
    for job in jobs:
        if training_to_do(job) is None and evaluation_to_do(job) is None:
            say(run_job(job))
        else:
            pending.append(job)
    if experiment.ray:
        _run_on_ray(experiment, pending, say)
    else:
        _run_in_processes(experiment, pending, say)


def _run_in_processes(experiment: Experiment, jobs: Sequence[Job], say: Say) -> None:
    context = multiprocessing.get_context("forkserver")  # imports torch and transformers once, for all jobs
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(experiment.jobs, mp_context=context, max_tasks_per_child=1) as pool:
        try:
            for future in as_completed([pool.submit(_run_in_child, job) for job in jobs]):
                say(future.result())
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _run_in_child(job: Job) -> str:
    """`run_job` in a process that ends if its parent is killed."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    return run_job(job)


def _end_with_parent() -> None:
    """Wait for the end of the parent, then end as by `kill`: a training writes its checkpoint."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "a job runs in a child"
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def _run_on_ray(experiment: Experiment, jobs: Sequence[Job], say: Say) -> None:
    try:
        import ray
    except ImportError as error:
        raise ImportError('compare on ray: pip install "rlpretrain[ray]"') from error
    ray.init(experiment.ray, include_dashboard=False, ignore_reinit_error=True, log_to_driver=False)
    options: dict[str, Any] = {"max_retries": 2, **experiment.resources}
    remote_job = ray.remote(**options)(run_job)
    pending = [remote_job.remote(job) for job in jobs]
    while pending:
        (finished,), pending = ray.wait(pending)
        say(ray.get(finished))


def run_job(job: Job) -> str:
    """Train and evaluate, as far as that is not done; returns a line that says what was done."""
    steps_done = []
    try:
        if config := training_to_do(job):
            job.folder.mkdir(parents=True, exist_ok=True)
            write_json(job.folder / "wanted.json", to_dict(config))
            ended = Pretrainer(config).train(resume="auto")
            reason = f" ({ended['stopped']})" if ended["stopped"] else ""
            steps_done.append(f"trained {ended['steps']} steps{reason}")
        if settings := evaluation_to_do(job):
            evaluate_job(job, settings)
            steps_done.append("evaluated")
    except ConfigError as error:
        raise ConfigError(f"{job.name}, seed {job.seed}: {error}") from None
    tried = "" if job.trial is None else f", {describe_values(chosen_values(job))}"
    return f"{job.name}, seed {job.seed}{tried}: {', '.join(steps_done) or 'done before'}"


def training_to_do(job: Job) -> PretrainConfig | None:
    """The configuration to train; None if that is done. ConfigError if the run has other settings."""
    if job.method is None:
        return None
    config = _training_config(job)
    wanted, record = job.folder / "wanted.json", job.folder / "run.json"
    if wanted.exists():
        before: dict[str, Any] = json.loads(wanted.read_text())
        before["engine"] = own_settings(before["engine"])  # older versions wrote those of all engines
        now: dict[str, Any] = json.loads(json.dumps(to_dict(config)))
        if different := changes(without(filled(before, now), MACHINE), without(now, MACHINE)):
            raise ConfigError(
                f"the run in {job.folder} has other settings: {'; '.join(different)}. Remove that folder or "
                "choose another output_dir"
            )
    is_done = record.exists() and json.loads(record.read_text())["status"] == "done"
    return None if is_done else config


def _training_config(job: Job) -> PretrainConfig:
    """The configuration of a job: with the values that `search` chose, from the model of the method that it
    comes after, and with the budget of the method that it is matched to.
    """
    method = job.experiment.methods[job.name]
    config = job.config(extra=chosen_values(job))
    if method.after is not None:
        model = replace(job, name=method.after, trial=None).folder / "model"
        saved = replace(config.model.saved_at(str(model)), quantization=config.model.quantization)
        config = replace(config, model=saved)
    if method.like is None:
        return config
    like = replace(job, name=method.like, trial=None)
    if method.match == "steps":
        return replace(config, max_steps=planned_steps(like.folder))
    budget = budget_left(job, like)
    if method.match == "tokens":
        return replace(config, stop=replace(config.stop, input_tokens=int(budget)))
    if method.cost_from is None:
        return replace(config, stop=replace(config.stop, flops=budget))
    spent = last_row(replace(job, name=method.cost_from, trial=None).folder)
    cost_of_position = spent["num_flops"] / (spent["step"] * job.config(method.cost_from).positions_per_step)
    cost_of_step = cost_of_position * config.positions_per_step
    return replace(config, max_steps=max(1, round(budget / cost_of_step)))


def evaluation_to_do(job: Job) -> dict[str, Any] | None:
    """The settings of an evaluation; None if it is done with these settings."""
    file, evaluation = job.folder / "evaluation.json", job.experiment.evaluation
    names = [job.name] if job.method else list(job.experiment.methods)
    objectives = {name: job.config(name).objective for name in names} if evaluation.own else {}
    shared = to_dict(replace(evaluation, search_data=None))  # an evaluation does not depend on it
    settings = json.loads(json.dumps({"evaluation": shared, "objectives": objectives}))
    if not file.exists():
        return settings
    stored = json.loads(file.read_text())
    before = stored.get("settings", {})
    before = before | {"evaluation": EARLIER_EVALUATION | before.get("evaluation", {})}
    has_rows = "rows" in stored.get("common", {})  # not in those of an older version
    has_meta = set(stored.get("meta", {})) == set(evaluation.data.meta_columns)
    return None if before == settings and has_rows and has_meta else settings


def evaluate_job(job: Job, settings: dict[str, Any]) -> None:
    """Evaluate by the common objective and by the method's own, the base model by those of all methods."""
    evaluation = job.experiment.evaluation
    config = job.config(job.name if job.method else next(iter(job.experiment.methods)))
    if config.threads:
        torch.set_num_threads(config.threads)
    path = str(job.folder / "model") if job.method else config.model.path
    shared = common_config(config, evaluation)
    common = _evaluate_model(job, shared, path, common=True)
    own = {}
    for name in settings["objectives"]:
        own_config = replace(job.config(name), data=evaluation.data, ntp_data=evaluation.data)
        own[name] = _evaluate_model(job, own_config, path)
    job.folder.mkdir(parents=True, exist_ok=True)
    record = {"settings": settings, "meta": common.pop("meta"), "common": common, "own": own}
    if evaluation.tasks:
        record["tasks"] = answer_tasks(job, shared, path)
    if evaluation.pass_at:
        record |= sample_answers(job, shared, path)
    write_json(job.folder / "evaluation.json", record)


def common_config(config: PretrainConfig, evaluation: CommonEvaluation) -> PretrainConfig:
    """The configuration by which all models are compared, with the model and device of `config`."""
    return build(
        {
            "model": to_dict(config.model),
            "data": to_dict(evaluation.data),
            "objective": evaluation.objective,
            "device": config.device,
            "sampling": {"max_thought_tokens": evaluation.max_thought_tokens},
        }
    )


def _evaluate_model(job: Job, config: PretrainConfig, path: str, common: bool = False) -> dict[str, Any]:
    """Numbers per position of the model at `path`, with the base model as the frozen one.

    `rows` are the source rows of the positions; with `common` the controls and `meta` are there too.
    """
    evaluation, device = job.experiment.evaluation, join(config.device).device
    tags = delimiters(config.objective)
    model, tokenizer = load_evaluated(job, config, path)
    base = models.load_with_tokenizer(config.model, tags, job.seed)[0]
    with bar(f"evaluating positions ({job.name}, seed {job.seed})") as progress:
        result = evaluate(
            model,
            load_objective(config, tokenizer),
            read_held_out(
                evaluation.data, tokenizer, limit=evaluation.documents, seed=evaluation.sample_seed
            ),
            frozen=base.to(device),
            thoughts=evaluation.thoughts,
            positions=evaluation.positions,
            seed=job.seed,
            controls=common,
            greedy=common and evaluation.greedy,
            pad_id=tokenizer.pad_token_id or 0,
            progress=progress,
        )
    record = result.columns()
    if common:
        record["meta"] = {name: result.meta(name) for name in evaluation.data.meta_columns}
    return record
