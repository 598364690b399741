"""Step time with `max_staleness: 1` over the longer of rollout and training."""

from __future__ import annotations

import asyncio
import random
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.rollout_setup import HIDDEN_128, make_model, train
from rlpretrain.corpora import dial
from rlpretrain.objectives import rlp
from rollout import FinishReason, Group, Thought

WARM_UP = 4
STALENESS = {"synchronous": 0, "asynchronous": 1}
MEASURED = ("step_time", "perf/rollout_s", "perf/train_s", "perf/sync_s", "perf/probe_s")


@dataclass(kw_only=True)
class Config(rlp.Config):
    """RLP's fields, and the time that a rollout takes."""

    seconds: float = 0.0


class Elsewhere(rlp.RLP):
    """RLP whose thoughts seem to come from another machine: random, after a while, at no cost here."""

    Config = Config

    async def rollout(self, engine: Any, positions: Any, seeds: Any) -> list[Group]:
        """Random thoughts of 24 tokens."""
        version = engine.version
        await asyncio.sleep(self.config.seconds)
        groups = []
        for position, seed in zip(positions, seeds, strict=True):
            words = random.Random(seed)
            thoughts = tuple(
                Thought(tuple(words.choices(range(30), k=24)), (-3.4,) * 24, FinishReason.LENGTH, version, g)
                for g in range(self.setting.thoughts)
            )
            name = f"{position.document_id}@{position.index}"
            groups.append(Group(name, position, self.prompt(position), thoughts, version))
        return groups


def asynchronous(steps: int = 14) -> dict[str, Any]:
    """The median step with max_staleness 1 over the longer of rollout and training.

    Once with rollouts on another machine that take about as long as training, and once with a vLLM actor on
    this machine, where the two compete for its cores.
    """
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder / "base", **HIDDEN_128)
        dial.write(folder / "data", base=10, train=2000, held_out=10, seed=0)
        dial.tokenizer().save_pretrained(folder / "base")
        first = measure_run(folder, "before", steps, {"name": "hf"}, 0.3)
        training_s = first["step_time"] - first["perf/rollout_s"]
        elsewhere, here = {}, {}
        for kind, staleness in STALENESS.items():
            engine = {"name": "hf", "max_staleness": staleness, "in_flight": 1}
            elsewhere[kind] = measure_run(folder, f"apart-{kind}", steps, engine, training_s)
        for kind, staleness in STALENESS.items():
            actor = {"name": "ray", "of": "vllm_local", "kv_cache_gib": 0.25, "in_flight": 1}
            here[kind] = measure_run(folder, f"here-{kind}", steps, actor | {"max_staleness": staleness})
    return {
        "another_machine": compare_runs(elsewhere),
        "this_machine": compare_runs(here),
        "two_processes_at_once": measure_contention(),
    }


def measure_run(
    folder: Path, name: str, steps: int, engine: dict[str, Any], seconds: float | None = None
) -> dict[str, float]:
    """Medians over the steps of a run; with `seconds` its rollouts take that long, elsewhere."""
    objective: dict[str, Any] = {"name": "rlp", "positions": "after", "marker": "shows"}
    if seconds is not None:
        objective |= {"name": "benchmarks.rollout_ahead:Elsewhere", "seconds": seconds}
    rows = train(
        folder,
        name,
        folder / "data" / "train.jsonl",
        objective=objective,
        engine=engine,
        sampling={"thoughts": 8, "max_thought_tokens": 24, "cut": "force_close"},
        positions_per_step=24,
        max_steps=steps,
        threads=1,
    )
    return {key: statistics.median(row.get(key, 0.0) for row in rows[WARM_UP:]) for key in MEASURED}


def compare_runs(runs: dict[str, dict[str, float]]) -> dict[str, Any]:
    """The asynchronous step over the longer part of the synchronous one, and over all of it."""
    alone, ahead = runs["synchronous"], runs["asynchronous"]
    longer = max(alone["perf/rollout_s"], alone["step_time"] - alone["perf/rollout_s"])
    return {
        "step_over_the_longer": ahead["step_time"] / longer,
        "over_synchronous": ahead["step_time"] / alone["step_time"],
        "longer_s": longer,
        **runs,
    }


def measure_contention() -> float:
    """The time of a process when a second one works beside it, over its time alone."""
    work = (
        "import time, torch; torch.set_num_threads(1); x = torch.randn(512, 512); b = time.perf_counter()\n"
        "for _ in range(600): x @ x\n"
        "print(time.perf_counter() - b)"
    )

    def mean_seconds(processes: int) -> float:
        command = [sys.executable, "-c", work]
        running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(processes)]
        return statistics.mean(float(process.communicate()[0]) for process in running)

    return statistics.median(mean_seconds(2) / mean_seconds(1) for _ in range(5))
