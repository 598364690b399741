"""What a person sees while a run goes on: a progress bar with the time left, and now and then the thoughts
of one position.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any

from rich.console import Console as Rich
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from rlpretrain.config import PretrainConfig
from rlpretrain.data.token_text import TokenReader
from rollout.types import Group

SHOWN = {
    "loss": "loss",
    "ig/mean": "gain",
    "ig/frozen": "frozen",
    "ntp/loss": "ntp",
    "thought/closed_frac": "closed",
    "completions/mean_length": "length",
    "grad_norm": "norm",
}
LONGEST = 2_000
"""Characters of a thought or context that are shown."""


class Console:
    """Speaks on the first rank only, and not at all with `console: false`."""

    def __init__(self, config: PretrainConfig, total: int, done: int, first: bool):
        self.quiet, self.every = not (first and config.console), config.log_every
        self.rich = Rich(quiet=self.quiet)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
        )
        self.progress = Progress(*columns, console=self.rich, disable=self.quiet or not self.rich.is_terminal)
        self.task = self.progress.add_task(
            str(config.objective.get("name", "rlp")), total=total, completed=done, numbers=""
        )
        self.tables = max(1, total // 5)
        self.progress.start()

    def say(self, text: str | None) -> None:
        """A line, if there is one."""
        if text:
            self.rich.print(escape(text))

    def step(self, step: int, row: dict[str, float], groups: Sequence[Group], tokenizer: Any) -> None:
        """One step's numbers; five times a run, the thoughts of a position."""
        if self.quiet:
            return
        numbers = "  ".join(f"{short} {row[name]:.3f}" for name, short in SHOWN.items() if name in row)
        self.progress.update(self.task, completed=step, numbers=numbers)
        if not self.rich.is_terminal and (step % self.every == 0):
            self.rich.print(escape(f"step {step}  {numbers}  {row['step_time']:.2f} s"), soft_wrap=True)
        if groups and (step == 1 or step % self.tables == 0):
            self.rich.print(thought_table(groups[0], tokenizer))
        held_out = {k: v for k, v in row.items() if k.startswith("eval/")}
        if held_out:
            self.rich.print(
                escape(f"step {step}  " + "  ".join(f"{k} {v:.3f}" for k, v in sorted(held_out.items()))),
                soft_wrap=True,
            )

    def close(self) -> None:
        self.progress.stop()


def thought_table(group: Group, tokenizer: Any, limit: int = 4) -> Table:
    """The thoughts of one position, as text."""
    reader, position = TokenReader(tokenizer), group.position
    context = shown(reader.text(position.context_ids[-24:], after=position.context_ids[:-24]))
    target = shown(reader.spelled(position.target_ids, after=position.context_ids))
    table = Table("thought", "tokens", "ended", title=escape(f"…{context} ▸ {target}"), title_justify="left")
    for t in group.thoughts[:limit]:
        text = shown(reader.text(t.token_ids, after=group.prompt.token_ids))
        table.add_row(escape(text), str(len(t.token_ids)), str(t.finish_reason))
    return table


def shown(text: str, longest: int = LONGEST) -> str:
    """Text as it can be shown: cut in the middle, and what would be invisible or turn the line around made
    visible.
    """
    if len(text) > longest:
        text = (
            f"{text[: longest * 3 // 4]} … {len(text) - longest} characters left out … "
            f"{text[-longest // 4 :]}"
        )
    return "".join(map(_visible, text))


def _visible(c: str) -> str:
    if c in "\n\t" or c.isprintable() or c == "\u200d":  # the last joins emoji
        return c
    if ord(c) < 32:
        return chr(0x2400 + ord(c))
    return f"⟨U+{ord(c):04X}⟩" if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Cn", "Co", "Zl", "Zp") else c
