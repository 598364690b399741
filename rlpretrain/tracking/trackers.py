"""Where a run's metrics and thoughts are written: metrics.jsonl, TensorBoard, wandb, trackio."""

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
from rlpretrain.tracking.console import printable
from rollout.types import Group

THOUGHT_COLUMNS = ("position", "context", "target", "thought", "tokens", "ended by", "reward")
"""Columns of the table of thoughts."""
CONTEXT_TOKENS = 48

ThoughtRow = tuple[Any, ...]
"""A thought as a row of `THOUGHT_COLUMNS`."""
Sink = Callable[[dict[str, float], int, list[ThoughtRow]], None]
"""Writes the metrics of a step, and some of its thoughts, to one tracker."""


class Trackers:
    """metrics.jsonl always; TensorBoard, wandb and trackio if asked for. Only the first rank writes."""

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
        self.every = every
        self.closers: list[Callable[[], None]] = []
        self.sinks: list[Sink] = []
        _drop_rows_after(self.file, keep_until)
        if "tensorboard" in report_to:
            self._add_tensorboard(folder, keep_until)
        for name in ("wandb", "trackio"):
            if name in report_to:
                self._add_tracker(name, config, run_name)

    def _add_tensorboard(self, folder: Path, keep_until: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError('report_to names tensorboard: pip install "rlpretrain[tensorboard]"') from error
        purge_step = keep_until + 1 if keep_until else None
        board = SummaryWriter(str(folder / "tensorboard"), purge_step=purge_step)
        self.sinks.append(partial(_write_to_board, board))
        self.closers.append(board.close)

    def _add_tracker(self, name: str, config: dict[str, Any], run_name: str) -> None:
        """wandb or trackio; the two have the same interface."""
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            raise ImportError(
                f"report_to names {name}, which is not installed: pip install {name}"
            ) from error
        module.init(project="rlpretrain", name=run_name, config=config)
        self.sinks.append(partial(_write_to_tracker, module))
        self.closers.append(module.finish)

    def write(
        self,
        step: int,
        row: dict[str, float],
        groups: Sequence[Group] = (),
        tokenizer: Any = None,
        rewards: Mapping[tuple[str, int], float] | None = None,
    ) -> None:
        """Write one step to metrics.jsonl and every tracker; every `every` steps also some thoughts.

        A value that is not finite is null in the file, and left out for trackers, which would draw it.
        """
        with writing(self.file), self.file.open("a") as file:
            file.write(dumps({"step": step, "time": round(time.time(), 3), **row}) + "\n")
        with_thoughts = groups and self.sinks and (step == 1 or step % self.every == 0)
        thoughts = thought_rows(groups, tokenizer, rewards) if with_thoughts else []
        finite = {name: value for name, value in row.items() if value is not None and math.isfinite(value)}
        for sink in self.sinks:
            sink(finite, step, thoughts)

    def close(self) -> None:
        """Finish every tracker."""
        for close in self.closers:
            close()


def _drop_rows_after(file: Path, step: int) -> None:
    """Remove the steps that a resumed run repeats, after its checkpoint at `step`."""
    if not file.exists():
        return
    kept = [line for line in file.read_text().splitlines() if _step_of(line) <= step]
    work = file.with_suffix(".tmp")
    with writing(file):
        work.write_text("".join(line + "\n" for line in kept))
        work.replace(file)


def _step_of(line: str) -> float:
    """The step of a line of metrics.jsonl; infinity for an incomplete line, which is then dropped."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return float("inf")


def _write_to_board(board: Any, row: dict[str, float], step: int, thoughts: list[ThoughtRow]) -> None:
    for name, value in row.items():
        board.add_scalar(name, value, step)
    if thoughts:
        board.add_text("thoughts", markdown(thoughts), step)


def _write_to_tracker(module: Any, row: dict[str, float], step: int, thoughts: list[ThoughtRow]) -> None:
    """One call per step: wandb and trackio may count a second call as another step."""
    if not thoughts:
        module.log(row, step=step)
        return
    import pandas  # installed with datasets

    # dtype object, so that a missing reward stays None; old versions of trackio take data frames only
    frame = pandas.DataFrame(thoughts, columns=list(THOUGHT_COLUMNS), dtype=object)
    module.log({**row, "thoughts": module.Table(dataframe=frame)}, step=step)


def thought_rows(
    groups: Sequence[Group],
    tokenizer: Any,
    rewards: Mapping[tuple[str, int], float] | None = None,
    positions: int = 4,
    thoughts: int = 4,
) -> list[ThoughtRow]:
    """Some thoughts of a step as rows of `THOUGHT_COLUMNS`, control characters made visible.

    The reward is that of `rewards`, by group id and index of the thought, else the one stored on the group;
    None if there is none or the thought does not count.
    """
    known, reader = rewards or {}, TokenReader(tokenizer)
    rows: list[ThoughtRow] = []
    for group in groups[:positions]:
        position, prompt_ids = group.position, group.prompt.token_ids
        place = f"{position.document_id}@{position.index}"
        before, context_ids = position.context_ids[:-CONTEXT_TOKENS], position.context_ids[-CONTEXT_TOKENS:]
        context = printable(reader.text(context_ids, after=before))
        target = printable(reader.spelled(position.target_ids, after=position.context_ids))
        for k, thought in enumerate(group.thoughts[:thoughts]):
            text = printable(reader.text(thought.token_ids, after=prompt_ids))
            stored = math.nan if group.rewards is None else group.rewards[k]
            reward = known.get((group.id, k), stored)
            length, reason = len(thought.token_ids), str(thought.finish_reason)
            rows.append(
                (place, context, target, text, length, reason, None if math.isnan(reward) else reward)
            )
    return rows


def markdown(rows: Sequence[ThoughtRow]) -> str:
    """A markdown table for TensorBoard; every cell is code, so that no markdown in a thought is rendered."""
    table = [THOUGHT_COLUMNS, ["---"] * len(THOUGHT_COLUMNS), *(map(_code, row) for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in table)


def _code(value: Any) -> str:
    if value is None:
        return ""
    text = str(value).replace("`", "'").replace("|", "¦").replace("\n", " ⏎ ")
    return f"`{text}`"
