"""A training run as a process that can be killed and resumed, and an account of its groups."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.distributed.checkpoint import state_dict_loader

from rlpretrain.training import checkpoint
from rlpretrain.training.backends import fsdp
from rollout.store import Store
from rollout.types import FinishReason, Group
from tests.builders.processes import PROCESSES, free_port, warm
from tests.builders.runs import weights


class Trainer:
    """`rlpretrain train` in a process, or in several ranks, with a thread that watches its log.

    `longest` is the longest time in seconds between two steps, restarts included. Processes that make no
    progress for `patience` seconds are killed. `log` is their output, by default a file in the run's folder.
    `hung` counts ranks that were killed after another, `named` faults that an error of the command named.
    """

    def __init__(
        self, values: dict[str, Any], patience: float = 480.0, ranks: int = 1, log: Path | None = None
    ):
        self.folder, self.steps, self.patience = Path(values["output_dir"]), values["max_steps"], patience
        self.ranks, self.log = ranks, log or self.folder / "log.txt"
        self.longest, self.done_again, self.hung, self.named = 0.0, 0, 0, 0
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
        group = {"WORLD_SIZE": str(self.ranks), "LOCAL_WORLD_SIZE": str(self.ranks)}
        group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        self.processes = []
        for rank in range(self.ranks):
            own = group | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if self.ranks > 1 else {}
            process = PROCESSES.Process(target=command_line, args=(words, self.log, own), daemon=True)
            process.start()
            self.processes.append(process)

    def step(self) -> int:
        """The last step that was logged."""
        return self._last()[0]

    def _last(self) -> tuple[int, float]:
        lines = rows(self.folder, newest=1)
        return (lines[0]["step"], lines[0]["time"]) if lines else (0, 0.0)

    @property
    def pid(self) -> int:
        """The process of the first rank."""
        return self.processes[0].pid

    def alive(self) -> bool:
        """Whether all processes run."""
        return all(process.is_alive() for process in self.processes)

    def kill(self, rank: int = 0) -> None:
        """Send SIGKILL to a rank, and wait until the others have ended too."""
        self.processes[rank].kill()
        self.end()

    def end(self, patience: float = 30.0) -> None:
        """Wait for all processes; those that still run then are killed, as launchers do, and counted.

        `done_again` counts the steps that a resumed run will repeat.
        """
        end = time.monotonic() + patience
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
            if process.is_alive():
                self.hung += 1
                process.kill()
                process.join()
        self.done_again += self.step() - max(checkpoint.steps(self.folder), default=0)

    def wait(self) -> bool:
        """Wait for the end; returns whether the run is complete, and prints the end of its log if not."""
        for process in self.processes:
            process.join()
        self.ended.set()
        self.watcher.join()
        file = self.folder / "run.json"
        record = json.loads(file.read_text()) if file.exists() else {"status": "no run.json"}
        good = (
            all(process.exitcode == 0 for process in self.processes)
            and record["status"] == "done"
            and record["step"] == record["total_steps"]
        )
        if not good:
            print(f"{self.folder.name} failed: {self.log.read_text()[-3000:]}", file=sys.stderr)
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
                for process in self.processes:
                    process.kill()
                return


def command_line(words: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
    """Run the command `rlpretrain` in this process and exit."""
    os.environ |= environment
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


def trained(folder: Path, ranks: int = 1) -> Iterator[tuple[int, Group]]:
    """(step, group) of every step that a run logged, in the order of its log."""
    for store in (Store(folder / "rollouts", rank) for rank in range(ranks)):
        held = set(store.steps())
        for step in (row["step"] for row in rows(folder)):
            yield from ((step, group) for group in (store.read(step)[0] if step in held else ()))


def account(folder: Path, reference: Path, steps: int, ahead: int = 0, ranks: int = 1) -> Counter[str]:
    """Count what became of the groups of the first `steps` steps of `reference`, an undisturbed run.

    `same` groups have the reference's thoughts, token for token: without sampling ahead, seeds and weights
    decide them. `updates` is the number of optimizer steps. `left_over` is the number of stored steps that
    were never logged.
    """
    wanted = {group.id: (step, group) for step, group in trained(reference, ranks) if step <= steps}
    found, times, aborted = Counter(expected=len(wanted)), Counter(), set()
    for step, group in trained(folder, ranks):
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
        left_over=sum(len(Store(folder / "rollouts", rank).steps()) for rank in range(ranks))
        - ranks * len(rows(folder)),
        updates=updates_of(newest) if newest else 0,
    )
    return found


def updates_of(saved: Path) -> int:
    """The optimizer steps in a checkpoint of any backend."""
    if (saved / fsdp.STATE).is_dir():
        state = {"steps": 0}
        state_dict_loader.load(state, checkpoint_id=saved / fsdp.STATE, no_dist=True)
        return state["steps"]
    sharded = saved / "deepspeed" / "mp_rank_00_model_states.pt"
    if not sharded.exists():
        sharded = saved / "deepspeed" / "zero_pp_rank_0_mp_rank_00_model_states.pt"  # of ZeRO 3
    file = saved / "policy.pt"
    return torch.load(file if file.exists() else sharded, weights_only=file.exists())["steps"]


def apart(folder: Path, reference: Path) -> float:
    """The largest difference between the weights that two runs saved at their ends."""
    a, b = weights(folder / "model"), weights(reference / "model")
    return max(float((a[name] - b[name]).abs().max()) for name in a)
