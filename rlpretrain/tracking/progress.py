"""A progress bar with the time left, for work that is not a run."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

QUIET_SECONDS = 30.0
"""Where there is no terminal, a line is printed this often."""


@contextmanager
def bar(description: str) -> Iterator[Callable[[int, int], None]]:
    """Give a function of (done, total) that shows both and the time left, on standard error.

    On a terminal it is a bar, which disappears at the end; elsewhere a line from time to time.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines(description)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(description, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


class _Lines:
    """Prints progress as lines."""

    def __init__(self, description: str):
        self.description = description
        self.begin = self.last = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self.last < QUIET_SECONDS or done >= total:
            return
        self.last = now
        left = (now - self.begin) / done * (total - done)
        print(f"{self.description}: {done} of {total}, {left:.0f} s left", file=sys.stderr, flush=True)
