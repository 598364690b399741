"""Ctrl-C and SIGTERM: the run finishes its step, writes a checkpoint and says how to resume."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

TOGETHER = 2.0
"""Seconds within which several signals count as one.

A terminal signals every process, and a launcher then signals its own again.
"""


class Interrupted(KeyboardInterrupt):
    """A signal ended a run after a complete step; the message names the step and how to resume."""

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.number = number


class Signals:
    """Records the first SIGINT or SIGTERM while its `with` block runs.

    A second Ctrl-C raises KeyboardInterrupt at once. Outside the main thread Python allows no signal
    handlers, and this does nothing.
    """

    def __init__(self, quiet: bool = False):
        self.quiet = quiet
        self.number: int | None = None
        """The first signal that arrived."""
        self.arrived_at = 0.0
        self.before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self.before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self.before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number is None:
            self.number, self.arrived_at = number, time.monotonic()
            if not self.quiet:
                again = "; Ctrl-C again stops at once" if number == signal.SIGINT else ""
                text = (
                    f"\n{signal.Signals(number).name}: finishing the step under way, then a "
                    f"checkpoint{again}\n"
                )
                os.write(2, text.encode())  # print is not safe inside a handler
        elif number == signal.SIGINT and time.monotonic() - self.arrived_at > TOGETHER:
            raise KeyboardInterrupt
