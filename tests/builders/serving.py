"""`rlpretrain serve` in a forked process."""

from __future__ import annotations

from benchmarks import bad_input
from tests.builders.processes import Forked, start


class Serving(bad_input.Serving):
    """A real service with a small random model, a token and a folder for weights."""

    def start(self, command: list[str]) -> Forked:
        return start(command[1:], self.log)
