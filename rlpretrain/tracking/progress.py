"""A progress bar with the time left, for work that is not a run."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Tick = Callable[[], None]
"""Called after each part of a work."""
QUIET_SECONDS = 30.0
"""Where there is no terminal, a line is printed this often."""


@contextmanager
def bar(description: str) -> Iterator[Callable[[int, int], None]]:
    """Give a function of (done, total) that shows both and the time left, on standard error.

    On a terminal it is a bar, which disappears at the end; elsewhere a line from time to time.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield Lines(description)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(description, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def no_tick() -> None:
    """For work whose progress nobody shows."""


class Ticks:
    """Counts finished parts of a work for a function of (done, total); without one it only counts."""

    def __init__(self, progress: Callable[[int, int], None] | None, total: int):
        self.progress, self.done, self.total = progress, 0, total

    def __call__(self) -> None:
        """One more part is done."""
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.total)


class Lines:
    """Prints progress as lines, by default on standard error."""

    def __init__(self, description: str, say: Callable[[str], None] | None = None):
        self.description, self.say = description, say or _to_standard_error
        self.begin = self.last = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if done >= total:
            self.begin = self.last = now  # the next work begins
            return
        if now - self.last < QUIET_SECONDS:
            return
        self.last = now
        left = (now - self.begin) / done * (total - done)
        self.say(f"{self.description}: {done} of {total}, {left:.0f} s left")


def _to_standard_error(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
