"""A training run as a process that can be killed and resumed, and an account of its groups."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from rlpretrain.training import checkpoint
from rollout.store import Store
from rollout.types import FinishReason, Group
from tests.builders.processes import PROCESSES, warm


class Trainer:
    """`rlpretrain train` in a process, with a thread that watches its log.

    `longest` is the longest time in seconds between two steps, restarts included. A process that makes no
    progress for `patience` seconds is killed.
    """

    def __init__(self, values: dict[str, Any], patience: float = 480.0):
        self.folder, self.steps, self.patience = Path(values["output_dir"]), values["max_steps"], patience
        self.longest, self.done_again = 0.0, 0
        self.folder.mkdir(parents=True)
        (self.folder / "config.yaml").write_text(yaml.safe_dump(values))
        self.start()
        self.ended = threading.Event()
        self.watcher = threading.Thread(target=self._watch, daemon=True)
        self.watcher.start()

    def start(self, *words: str) -> None:
        """Start the trainer for the first time or again."""
        words = ("train", str(self.folder / "config.yaml"), *words)
        warm()
        self.process = PROCESSES.Process(
            target=command_line, args=(words, self.folder / "log.txt"), daemon=True
        )
        self.process.start()

    def step(self) -> int:
        """The last step that was logged."""
        return self._last()[0]

    def _last(self) -> tuple[int, float]:
        lines = rows(self.folder, newest=1)
        return (lines[0]["step"], lines[0]["time"]) if lines else (0, 0.0)

    def alive(self) -> bool:
        """Whether the process runs."""
        return self.process.is_alive()

    def kill(self) -> None:
        """Send SIGKILL; `done_again` counts the steps that a resumed run will repeat."""
        self.process.kill()
        self.process.join()
        self.done_again += self.step() - max(checkpoint.steps(self.folder), default=0)

    def wait(self) -> bool:
        """Wait for the end; returns whether the run is complete, and prints the end of its log if not."""
        self.process.join()
        self.ended.set()
        self.watcher.join()
        file = self.folder / "run.json"
        record = json.loads(file.read_text()) if file.exists() else {"status": "no run.json"}
        good = (
            self.process.exitcode == 0
            and record["status"] == "done"
            and record["step"] == record["total_steps"]
        )
        if not good:
            print(
                f"{self.folder.name} failed: {(self.folder / 'log.txt').read_text()[-3000:]}", file=sys.stderr
            )
        return good

    def _watch(self) -> None:
        newest, since = 0.0, time.monotonic()
        while not self.ended.wait(0.02):
            now, (step, at) = time.monotonic(), self._last()
            if newest and step < self.steps:
                self.longest = max(self.longest, now - since)
            if at > newest:  # a resumed run cuts its file back to older rows
                newest, since = at, now
            elif now - since > self.patience:
                return self.process.kill()


def command_line(words: Sequence[str], log: Path) -> None:
    """Run the command `rlpretrain` in this process and exit."""
    with log.open("ab") as out:
        for stream in (1, 2):
            os.dup2(out.fileno(), stream)
    from rlpretrain.cli import main

    sys.exit(main(words))


def rows(folder: Path, newest: int = 0) -> list[dict[str, Any]]:
    """The rows of a run's metrics, or the `newest` of them, without a line that is still being written."""
    file = folder / "metrics.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return [json.loads(line) for line in lines[-newest:]]


def trained(folder: Path) -> Iterator[tuple[int, Group]]:
    """(step, group) of every step that a run logged, in the order of its log."""
    store = Store(folder / "rollouts")
    held = set(store.steps())
    for step in (row["step"] for row in rows(folder)):
        yield from ((step, group) for group in (store.read(step)[0] if step in held else ()))


def account(folder: Path, reference: Path, steps: int, ahead: int = 0) -> Counter[str]:
    """Count what became of the groups of the first `steps` steps of `reference`, an undisturbed run.

    `same` groups have the reference's thoughts, token for token: without sampling ahead, seeds and weights
    decide them. `updates` is the number of optimizer steps. `left_over` is the number of stored steps that
    were never logged.
    """
    wanted = {group.id: (step, group) for step, group in trained(reference) if step <= steps}
    found, times, aborted = Counter(expected=len(wanted)), Counter(), set()
    for step, group in trained(folder):
        place, original = wanted.get(group.id, (None, None))
        if any(t.finish_reason is FinishReason.ABORT for t in group.thoughts):
            aborted.add(group.id)
            continue
        times[group.id] += 1
        found["out_of_place"] += place != step
        if original and not ahead:
            same = [t.token_ids for t in original.thoughts] == [t.token_ids for t in group.thoughts]
            found["same" if same else "other_thoughts"] += 1
    newest, _ = checkpoint.latest(folder)
    found.update(
        once=sum(times[i] == 1 for i in wanted),
        twice=sum(n > 1 for n in times.values()),
        aborted=len(aborted),
        lost=sum(not times[i] and i not in aborted for i in wanted),
        left_over=len(Store(folder / "rollouts").steps()) - len(rows(folder)),
        updates=torch.load(newest / "policy.pt", weights_only=True)["steps"] if newest else 0,
    )
    return found


def apart(folder: Path, reference: Path, step: int) -> float:
    """The largest difference between the weights of two runs' checkpoints at a step."""
    a, b = (
        torch.load(f / f"checkpoint-{step}" / "policy.pt", weights_only=True)["model"]
        for f in (folder, reference)
    )
    return max(float((a[name] - b[name]).abs().max()) for name in a)
