"""What a run prints: a progress bar, the numbers of its steps, and sometimes the thoughts of a position."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any

from rich.console import Console as Rich
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from rlpretrain.config import PretrainConfig
from rlpretrain.data.token_text import TokenReader
from rlpretrain.tracking.progress import Lines
from rollout.types import Group

SHORT_NAMES = {
    "loss": "loss",
    "ig/mean": "gain",
    "ig/frozen": "frozen",
    "ntp/loss": "ntp",
    "ntp/trained_loss": "trained",
    "thought/closed_frac": "closed",
    "completions/mean_length": "length",
    "grad_norm": "norm",
    "perf/tokens_per_s": "tokens/s",
    "perf/mfu": "mfu",
}
"""The metrics that are printed, and their names there."""
LONGEST = 2_000
"""Characters of a thought or context that are printed."""
CONTEXT_TOKENS = 24
TABLES_PER_RUN = 5
ZERO_WIDTH_JOINER = "\u200d"
INVISIBLE = ("Cc", "Cf", "Cs", "Cn", "Co", "Zl", "Zp")
"""Unicode categories without a glyph, or that change the direction of text."""


class Console:
    """Prints on the first rank only, and not at all with `console: false`."""

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
        name = str(config.objective.get("name", "rlp"))
        self.task = self.progress.add_task(name, total=total, completed=done, numbers="")
        self.table_every = max(1, total // TABLES_PER_RUN)
        self.part: TaskID | None = None
        self.lines = Lines("evaluating positions", self.say)
        self.progress.start()

    def say(self, text: str | None) -> None:
        """Print a line, if there is one."""
        if text:
            self.rich.print(escape(text))

    def step(self, step: int, row: dict[str, float], groups: Sequence[Group], tokenizer: Any) -> None:
        """Print one step's numbers, and five times a run the thoughts of a position."""
        if self.quiet:
            return
        known = [(short, row[name]) for name, short in SHORT_NAMES.items() if name in row]
        numbers = "  ".join(f"{short} {_format(value)}" for short, value in known)
        self.progress.update(self.task, completed=step, numbers=numbers)
        if not self.rich.is_terminal and step % self.every == 0:
            self.rich.print(escape(f"step {step}  {numbers}  {row['step_time']:.2f} s"), soft_wrap=True)
        if groups and (step == 1 or step % self.table_every == 0):
            self.rich.print(thought_table(groups[0], tokenizer))
        evaluated = [
            (name, row[name]) for name in sorted(row) if name.startswith(("eval/", "eval_averaged/"))
        ]
        held_out = [f"{name} {value:.3f}" for name, value in evaluated]
        if held_out:
            self.rich.print(escape(f"step {step}  " + "  ".join(held_out)), soft_wrap=True)

    def evaluating(self, done: int, total: int) -> None:
        """Show how much of an evaluation is done, and the time left."""
        if self.progress.disable:
            self.lines(done, total)
            return
        if self.part is None:
            self.part = self.progress.add_task("evaluating positions", total=total, numbers="")
        self.progress.update(self.part, completed=done)
        if done >= total:
            self.progress.remove_task(self.part)
            self.part = None

    def close(self) -> None:
        """Remove the progress bar."""
        self.progress.stop()


def thought_table(group: Group, tokenizer: Any, limit: int = 4) -> Table:
    """The thoughts of one position, as text."""
    reader, position = TokenReader(tokenizer), group.position
    before, context_ids = position.context_ids[:-CONTEXT_TOKENS], position.context_ids[-CONTEXT_TOKENS:]
    context = printable(reader.text(context_ids, after=before))
    target = printable(reader.spelled(position.target_ids, after=position.context_ids))
    title = escape(f"…{context} ▸ {target}")
    table = Table("thought", "tokens", "ended", title=title, title_justify="left")
    for thought in group.thoughts[:limit]:
        text = printable(reader.text(thought.token_ids, after=group.prompt.token_ids))
        table.add_row(escape(text), str(len(thought.token_ids)), str(thought.finish_reason))
    return table


def printable(text: str, longest: int = LONGEST) -> str:
    """Text that is safe to print: shortened in the middle, with invisible characters spelled out.

    >>> printable("a\\x1b[0m"), printable("abcdefgh", 4)
    ('a␛[0m', 'abc … 4 characters left out … h')
    """
    if len(text) > longest:
        head, tail = text[: longest * 3 // 4], text[-longest // 4 :]
        text = f"{head} … {len(text) - longest} characters left out … {tail}"
    return "".join(map(_visible, text))


def _format(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3f}"


def _visible(character: str) -> str:
    if character in "\n\t" or character.isprintable() or character == ZERO_WIDTH_JOINER:
        return character
    if ord(character) < 32:
        return chr(0x2400 + ord(character))  # its control picture
    if unicodedata.category(character) in INVISIBLE:
        return f"⟨U+{ord(character):04X}⟩"
    return character
