"""Benchmarks through lm-eval (EleutherAI's evaluation harness), directly and after a thought.

lm-eval makes the contexts, scores and generates; directly it does so exactly as its own command line. With an
objective every context is continued by a sampled thought first (rlpretrain/evaluation/thinking_lm.py). Tasks
are lm-eval's own, or YAML files in its format.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import io
import logging
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from rlpretrain.compat import INSTALL
from rlpretrain.config import ConfigError
from rlpretrain.evaluation.task_results import WAYS, Numbers, TaskResults, read_numbers
from rlpretrain.objectives import Objective
from rlpretrain.ranks import Ranks

PYTHON_SEED, OTHER_SEED = 0, 1234
"""lm-eval's own seeds: of Python's random numbers, and of all others. Few-shot examples depend on them."""


@dataclass(frozen=True, slots=True)
class Tasks:
    """Loaded tasks, as lm-eval's `TaskManager.load` returns them."""

    loaded: Any

    @property
    def by_name(self) -> dict[str, Any]:
        """lm-eval's Task of each name, those of groups included."""
        return self.loaded["tasks"]

    def with_thoughts(self) -> Tasks | None:
        """Only tasks that have a place for a thought, which those that score whole texts lack; None: none."""
        kept = {
            name: task for name, task in self.by_name.items() if task.OUTPUT_TYPE != "loglikelihood_rolling"
        }
        if len(kept) == len(self.by_name):
            return self
        return Tasks({"tasks": kept, "groups": {}, "group_map": {}}) if kept else None


def load_tasks(names: Sequence[str], include_path: str | None = None) -> Tasks:
    """Load tasks and their data by name, or from YAML files; `include_path` is a folder of such files.

    Raises ConfigError if lm-eval is not installed, and with the task's name for a task that does not exist or
    cannot run here.
    """
    check_installed()
    if include_path is not None and not Path(include_path).is_dir():
        raise ConfigError(f"no folder '{include_path}' with tasks")
    with _only_errors():
        manager = _task_manager(names, include_path)
        parts = [_load(manager, name) for name in names]
    tasks: dict[str, Any] = {}
    for name, part in zip(names, parts, strict=True):
        if twice := set(tasks) & set(part["tasks"]):
            raise ConfigError(f"task '{name}': {', '.join(sorted(twice))} is asked for twice")
        tasks |= part["tasks"]
    groups = {name: group for part in parts for name, group in part["groups"].items()}
    members = {group: of_group for part in parts for group, of_group in part["group_map"].items()}
    return Tasks({"tasks": tasks, "groups": groups, "group_map": members})


def check_installed() -> None:
    """Raise ConfigError with the install line if lm-eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(f"tasks need lm-eval, which is not installed: {INSTALL['eval']}")


def run_tasks(
    model: nn.Module,
    tokenizer: Any,
    tasks: Tasks,
    *,
    ways: Sequence[str] = WAYS,
    objective: Objective | None = None,
    examples: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
    ranks: Ranks | None = None,
    quiet: bool = False,
) -> TaskResults:
    """The numbers of a model on tasks: directly, and with an objective after its thoughts.

    `examples` limits the examples of each task to the first. `seed` is that of the thoughts; lm-eval keeps
    its own seeds, so that direct numbers are those of its command line. `batch_size` rows are scored at once.
    Several `ranks`, each with the whole model, share the examples; all of them get the results. `quiet` hides
    lm-eval's progress bars.

    Random states and the model's mode are afterwards what they were.
    """
    everybody = ranks or Ranks()
    fewest = min(len(task.eval_docs) for task in tasks.by_name.values())
    is_shared = min(fewest, examples or fewest) >= everybody.size  # lm-eval needs an example on every rank
    results = TaskResults({})
    if is_shared or everybody.first:
        sharing = everybody if is_shared else Ranks(device=everybody.device)
        with _as_it_was(model), _without_bars() if quiet else contextlib.nullcontext():
            results = _run(model, tokenizer, tasks, ways, objective, examples, seed, batch_size, sharing)
    return everybody.gather(results)[0]


def _run(
    model: nn.Module,
    tokenizer: Any,
    tasks: Tasks,
    ways: Sequence[str],
    objective: Objective | None,
    examples: int | None,
    seed: int,
    batch_size: int,
    ranks: Ranks,
) -> TaskResults:
    """The results on rank 0 of `ranks`; the others get none."""
    from rlpretrain.evaluation.thinking_lm import DirectLM, ThinkingLM

    results = TaskResults({})
    if "direct" in ways:
        with _only_errors():
            lm = DirectLM(model, tokenizer, batch_size, ranks)
        results = TaskResults(_numbers(lm, tasks, examples))
    with_place = tasks.with_thoughts()
    if "thinking" in ways and objective is not None and objective.has_positions and with_place is not None:
        with _only_errors():
            lm = ThinkingLM(model, tokenizer, batch_size, ranks, objective=objective, seed=seed)
        results = replace(results, thinking=_numbers(lm, with_place, examples), thoughts=_counts(lm, ranks))
    return results


def _task_manager(names: Sequence[str], include_path: str | None) -> Any:
    """lm-eval's manager of tasks, which knows these names if anything does.

    Reading the 14,000 files of lm-eval takes half a minute, so it reads only folders whose files mention one
    of the names, unless one is a group or a tag, whose members may be in any folder. In lm-eval's list the
    first file with a name counts, among several folders the last.
    """
    from lm_eval import tasks

    own = [include_path] if include_path is not None else []
    root = Path(tasks.__file__).parent
    files = [Path(name).expanduser() for name in names if _is_yaml(name)]
    named = [name for name in names if not _is_yaml(name)]
    if not any(re.search(r"^group:", file.read_text(), re.MULTILINE) for file in files):
        folders = _folders_that_mention(root, named) if named else []
        manager = tasks.TaskManager(include_path=[*reversed(folders), *own], include_defaults=False)
        entries = [manager.task_index.get(name) for name in named]
        if all(entry is not None and entry.kind.name in ("TASK", "PY_TASK") for entry in entries):
            return manager
    print("reading the list of lm-eval's tasks, which takes half a minute", flush=True)
    return tasks.TaskManager(include_path=include_path)


def _folders_that_mention(root: Path, names: Sequence[str]) -> list[Path]:
    """The folders of `root` with a YAML file in which one of the names is a word."""
    word = re.compile(rf"(?<![\w-])({'|'.join(map(re.escape, names))})(?![\w-])".encode())
    files = [file for file in root.glob("**/*.yaml") if word.search(file.read_bytes())]
    folders = {root / file.relative_to(root).parts[0] for file in files}
    return sorted(folders, key=lambda folder: f"{folder}/")


def _load(manager: Any, name: str) -> Any:
    """lm-eval's tasks of one name."""
    spec = name
    if _is_yaml(name):
        spec = str(Path(name).expanduser())
    elif name not in manager.all_tasks:
        near = difflib.get_close_matches(name, manager.all_tasks, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "give a name of lm-eval's, or a YAML file"
        raise ConfigError(f"no task '{name}': {hint}")
    try:
        loaded = manager.load([spec])
    except Exception as error:
        raise ConfigError(
            f"task '{name}' cannot be loaded: {_first_line(error)}. Without network its data must be in the "
            "cache of `datasets`, or in local files that a YAML file of yours names"
        ) from error
    for of_name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise ConfigError(f"task '{of_name}' runs code that the model wrote, which is not done here")
        if getattr(task, "MULTIMODAL", False):
            raise ConfigError(f"task '{of_name}' needs images or sound")
    return loaded


def _is_yaml(name: str) -> bool:
    return name.endswith((".yaml", ".yml")) and Path(name).expanduser().is_file()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _numbers(lm: Any, tasks: Tasks, examples: int | None) -> Numbers:
    """One evaluation by lm-eval, with the seeds and defaults of its `simple_evaluate`."""
    from lm_eval.evaluator import evaluate

    for task in tasks.by_name.values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=OTHER_SEED)
    with _harness_seeds(lm.device):
        results = evaluate(lm, tasks.loaded, limit=examples)
    return read_numbers(results) if results is not None else {}


def _counts(lm: Any, ranks: Ranks) -> dict[str, float]:
    counts = lm.counts
    thoughts, tokens, unclosed, cut = ranks.sum([counts.thoughts, counts.tokens, counts.unclosed, counts.cut])
    share = max(thoughts, 1)
    return {"number": thoughts, "length": tokens / share, "unclosed": unclosed / share, "cut_contexts": cut}


@contextlib.contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """No gradients; every submodule has its former mode afterwards, and evaluation mode before."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def _harness_seeds(device: torch.device) -> Iterator[None]:
    """lm-eval's seeds; all random states are put back afterwards."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        random.seed(PYTHON_SEED)
        np.random.seed(OTHER_SEED)
        torch.manual_seed(OTHER_SEED)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


@contextlib.contextmanager
def _only_errors() -> Iterator[None]:
    """Silence lm-eval's remarks on the defaults of tasks."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _without_bars() -> contextlib.AbstractContextManager[Any]:
    """Hide the progress bars of lm-eval, which would interrupt ours."""
    return contextlib.redirect_stderr(io.StringIO())
