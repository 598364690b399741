"""Where the numbers and thoughts of a run go: metrics.jsonl, TensorBoard, wandb, trackio."""

from __future__ import annotations

import importlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rlpretrain.data.token_text import TokenReader
from rlpretrain.files import dumps, writing
from rlpretrain.tracking.console import shown
from rollout.types import Group


class Trackers:
    """metrics.jsonl always; TensorBoard, wandb and trackio when asked for and installed. Only the first
    rank writes.
    """

    def __init__(
        self,
        folder: Path,
        report_to: tuple[str, ...],
        config: dict[str, Any],
        run_name: str,
        keep_until: int = 0,
        every: int = 1,
    ):
        self.file = folder / "metrics.jsonl"
        if self.file.exists():  # a resumed run: what came after its checkpoint will come again
            kept = [line for line in self.file.read_text().splitlines() if _step(line) <= keep_until]
            work = self.file.with_suffix(".tmp")
            with writing(self.file):
                work.write_text("".join(line + "\n" for line in kept))
                work.replace(self.file)
        self.every = every
        self.closers: list[Any] = []
        self.sinks: list[Callable[[dict[str, float], int, list[tuple[Any, ...]]], None]] = []
        if "tensorboard" in report_to:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ImportError(
                    'report_to names tensorboard: pip install "rlpretrain[tensorboard]"'
                ) from error
            board = SummaryWriter(
                str(folder / "tensorboard"), purge_step=keep_until + 1 if keep_until else None
            )
            self.sinks.append(partial(_to_board, board))
            self.closers.append(board.close)
        for name in ("wandb", "trackio"):
            if name in report_to:
                try:
                    module = importlib.import_module(name)  # the two share one interface
                except ImportError as error:
                    raise ImportError(
                        f"report_to names {name}, which is not installed: pip install {name}"
                    ) from error
                module.init(project="rlpretrain", name=run_name, config=config)
                self.sinks.append(partial(_to_tracker, module))
                self.closers.append(module.finish)

    def write(
        self,
        step: int,
        row: dict[str, float],
        groups: Sequence[Group] = (),
        tokenizer: Any = None,
        rewards: Mapping[tuple[str, int], float] | None = None,
    ) -> None:
        """One line of metrics.jsonl, and the same to every tracker; now and then the thoughts of some
        positions too.

        What is not a finite number is null in the file, and left out for trackers, which would draw it.
        """
        with writing(self.file), self.file.open("a") as f:
            f.write(dumps({"step": step, "time": round(time.time(), 3), **row}) + "\n")
        now = groups and self.sinks and (step == 1 or step % self.every == 0)
        thoughts = thought_rows(groups, tokenizer, rewards) if now else []
        known = {name: value for name, value in row.items() if value is not None and math.isfinite(value)}
        for sink in self.sinks:
            sink(known, step, thoughts)

    def close(self) -> None:
        for close in self.closers:
            close()


def _to_board(board: Any, row: dict[str, float], step: int, thoughts: list[tuple[Any, ...]]) -> None:
    for name, value in row.items():
        board.add_scalar(name, value, step)
    if thoughts:
        board.add_text("thoughts", markdown(thoughts), step)


def _to_tracker(module: Any, row: dict[str, float], step: int, thoughts: list[tuple[Any, ...]]) -> None:
    """One call for all of a step: what wandb and trackio are given later they may count as another."""
    if thoughts:
        import pandas  # brought by datasets

        # as objects, so that a missing reward stays one: old trackios read nothing but a data frame
        frame = pandas.DataFrame(thoughts, columns=list(COLUMNS), dtype=object)
        module.log({**row, "thoughts": module.Table(dataframe=frame)}, step=step)
    else:
        module.log(row, step=step)


COLUMNS = ("position", "context", "target", "thought", "tokens", "ended by", "reward")


def thought_rows(
    groups: Sequence[Group],
    tokenizer: Any,
    rewards: Mapping[tuple[str, int], float] | None = None,
    positions: int = 4,
    thoughts: int = 4,
) -> list[tuple[Any, ...]]:
    """Some thoughts of a step as rows of `COLUMNS`, control characters made visible. The reward is that of
    `rewards`, by group and place in it, or the one stored on the group; None where there is none, and where
    the thought counts nowhere.
    """
    known, reader = rewards or {}, TokenReader(tokenizer)
    out: list[tuple[Any, ...]] = []
    for group in groups[:positions]:
        at, prompt = group.position, group.prompt.token_ids
        where = f"{at.document_id}@{at.index}"
        context = shown(reader.text(at.context_ids[-48:], after=at.context_ids[:-48]))
        target = shown(reader.spelled(at.target_ids, after=at.context_ids))
        for k, thought in enumerate(group.thoughts[:thoughts]):
            ids, text = thought.token_ids, shown(reader.text(thought.token_ids, after=prompt))
            found = known.get((group.id, k), math.nan if group.rewards is None else group.rewards[k])
            reward = None if math.isnan(found) else found
            out.append((where, context, target, text, len(ids), str(thought.finish_reason), reward))
    return out


def markdown(rows: Sequence[tuple[Any, ...]]) -> str:
    """A table for TensorBoard, which renders markdown: every cell is code, so that nothing in a thought
    is.
    """

    def cell(value: Any) -> str:
        return (
            ""
            if value is None
            else "`" + str(value).replace("`", "'").replace("|", "¦").replace("\n", " ⏎ ") + "`"
        )

    lines = [" | ".join(COLUMNS), " | ".join("---" for _ in COLUMNS)]
    return "\n".join(f"| {line} |" for line in [*lines, *(" | ".join(map(cell, row)) for row in rows)])


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return float("inf")  # half a line: drop it
