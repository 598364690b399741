"""`rlpretrain eval --tasks`: benchmarks of lm-eval, directly and after a thought, beside the base's."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rlpretrain.commands.arguments import count, path
from rlpretrain.config import ModelConfig, PretrainConfig

if TYPE_CHECKING:
    from rlpretrain.evaluation.harness import Tasks
    from rlpretrain.evaluation.task_results import TaskNumber, TaskResults


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments for tasks."""
    group = parser.add_argument_group(
        "benchmarks", "tasks of lm-eval, answered directly and after a thought, beside those of --frozen"
    )
    group.add_argument(
        "--tasks", type=names, help="tasks of lm-eval or YAML files in its format, separated by commas"
    )
    group.add_argument("--include-path", type=path, help="folder with YAML files of further tasks")
    group.add_argument("--task-examples", type=count, help="examples of each task; all by default")
    group.add_argument("--task-batch", type=count, default=16, help="rows scored at once")


def names(text: str) -> list[str]:
    """Names separated by commas."""
    return [path(name.strip()) for name in text.split(",") if name.strip()]


def evaluate_tasks(
    args: argparse.Namespace, config: PretrainConfig, base_model: ModelConfig | None
) -> dict[str, Any]:
    """Run the tasks of `--tasks`, print their table, and return all numbers for the JSON file.

    Each model first answers directly, as it was saved, and only then gets the thought delimiters that it
    lacks. `base_model` is the untouched base, whose numbers are shown beside.
    """
    from rlpretrain.evaluation.harness import load_tasks
    from rlpretrain.tracking.tables import show

    tasks = load_tasks(args.tasks, args.include_path)
    # The base first, in case that it cannot be loaded.
    base = _answer(args, replace(config, model=base_model), tasks) if base_model else None
    results = _answer(args, config, tasks)
    show(table(results, base))
    print(thoughts_line(results))
    return results.as_dict(base) | {"base": base_model and base_model.path}


def table(results: TaskResults, base: TaskResults | None) -> Any:
    """The table of the tasks: a row for each metric, both ways and their paired difference."""
    from rich.table import Table

    columns = ["task/metric", "direct", "after a thought", "after - direct"]
    if base is not None:
        columns += ["base: direct", "base: after a thought", "direct - base", "after a thought - base"]
    shown = Table(*columns, title="benchmarks (lm-eval), 95% intervals over examples")
    for name, direct in results.direct.items():
        thinking = results.thinking.get(name)
        cells = [_cell(direct), _cell(thinking), _difference(thinking, direct)]
        if base is not None:
            base_direct, base_thinking = base.direct.get(name), base.thinking.get(name)
            cells += [_cell(base_direct), _cell(base_thinking)]
            cells += [_difference(direct, base_direct), _difference(thinking, base_thinking)]
        shown.add_row(name, *cells)
    return shown


def thoughts_line(results: TaskResults) -> str:
    """A line on the thoughts before the answers."""
    thoughts = results.thoughts
    if not thoughts:
        return "no thoughts: the objective has none, or the tasks have no place for one"
    line = (
        f"{thoughts['number']:.0f} thoughts of {thoughts['length']:.1f} tokens on average; "
        f"{thoughts['unclosed']:.0%} did not close themselves"
    )
    if thoughts["cut_contexts"]:
        line += f"; {thoughts['cut_contexts']:.0f} contexts lost their beginning to make room"
    return line


def _answer(args: argparse.Namespace, config: PretrainConfig, tasks: Tasks) -> TaskResults:
    """The results of one model."""
    from rlpretrain import models
    from rlpretrain.evaluation.harness import run_tasks
    from rlpretrain.objectives import delimiters, load_objective
    from rlpretrain.prompts import ensure_delimiters
    from rlpretrain.ranks import join

    model, tokenizer, _ = models.load_with_tokenizer(config.model, None, config.seed)
    model = model.to(join(args.device).device)
    limits: dict[str, Any] = {"examples": args.task_examples, "batch_size": args.task_batch}
    print(f"{config.model.path}: direct answers", flush=True)
    direct = run_tasks(model, tokenizer, tasks, ways=("direct",), **limits)
    if (tags := delimiters(config.objective)) is None:
        return direct
    print(f"{config.model.path}: answers after a thought", flush=True)
    ensure_delimiters(tokenizer, model, tags)
    objective = load_objective(config, tokenizer)
    thinking = run_tasks(
        model, tokenizer, tasks, ways=("thinking",), objective=objective, seed=config.seed, **limits
    )
    return replace(thinking, direct=direct.direct)


def _cell(number: TaskNumber | None) -> str:
    if number is None:
        return ""
    return f"{number.value:.3f}" + _ends(number.interval or (math.nan, math.nan))


def _difference(after: TaskNumber | None, before: TaskNumber | None) -> str:
    if after is None or before is None:
        return ""
    mean, *ends = after.minus(before)
    return f"{mean:+.3f}" + _ends(ends)


def _ends(ends: Sequence[float]) -> str:
    return "" if math.isnan(ends[0]) else f" [{ends[0]:.3f}, {ends[1]:.3f}]"
