"""Benchmarks during a run: the policy's numbers on `eval.tasks`, beside those of the untouched base."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from rlpretrain.evaluation.harness import run_tasks

if TYPE_CHECKING:
    from rlpretrain.training.run import Run


def task_metrics(run: Run) -> dict[str, float]:
    """The metrics of the current weights, with those of the base as `base_...`. All ranks call it."""
    if run.tasks is None:
        return {}
    return {f"eval/tasks/{name}": value for name, value in (_answer(run) | run.facts["base_tasks"]).items()}


def base_facts(run: Run) -> dict[str, Any]:
    """The entry `base_tasks` of run.json: the base's numbers, measured before the first step.

    A resumed run has those that run.json kept. All ranks call it.
    """
    if run.tasks is None:
        return {}
    if run.step == 0:
        numbers = _answer(run)
        thoughts = {name for name in numbers if name.startswith("thoughts/")}
        base = {_base_name(name): numbers[name] for name in numbers if name not in thoughts}
        return {"base_tasks": base}
    record = run.folder / "run.json"
    kept = json.loads(record.read_text()).get("base_tasks") if record.is_file() else None
    if kept is None:
        run.console.say("the base's numbers on eval.tasks are unknown: the run began without these tasks")
    return {"base_tasks": kept or {}}


def _answer(run: Run) -> dict[str, float]:
    """The numbers of the current weights."""
    assert run.tasks is not None, "called with tasks only"
    settings = run.config.eval
    run.console.say(f"step {run.step}: {len(run.tasks.by_name)} tasks, directly and after thoughts")
    results = run_tasks(
        run.evaluation.model(),
        run.tokenizer,
        run.tasks,
        objective=run.objective,
        examples=settings.task_examples,
        batch_size=settings.task_batch,
        seed=run.config.seed,
        ranks=run.ranks,
        quiet=True,
    )
    return results.metrics()


def _base_name(name: str) -> str:
    """ "task/metric/direct" as the base's "task/metric/base_direct"."""
    metric, _, way = name.rpartition("/")
    return f"{metric}/base_{way}"
