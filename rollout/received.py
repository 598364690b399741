"""The weights that a service is given: whole, or as changes of those that it has."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from rollout.changes import BASE, FOLLOWED, apply_changes, once
from rollout.weights import Parameter, complete, notes_of, read_weights


class Received:
    """Reads files of weights; keeps a copy in memory where changes of them will come."""

    def __init__(self, parameters: Sequence[Parameter]):
        self.parameters = parameters
        self.kept: dict[str, Tensor] = {}

    def read(self, source: Path, mark: str | None) -> dict[str, Tensor]:
        """The whole weights, every tied one under all its names; `mark` names those that the service has.

        Raises ValueError for a file that is unreadable, does not fit the model, or has changes of other
        weights.
        """
        notes, stored = notes_of(source), read_weights(source)
        if BASE not in notes:
            state = complete(stored, self.parameters)
            followed = FOLLOWED in notes
            self.kept = {n: t.clone() for n, t in once(state, self.parameters).items()} if followed else {}
            return state
        if not self.kept or notes[BASE] != mark:
            raise ValueError("these are changes of weights that this service does not have: send whole ones")
        apply_changes(self.kept, stored)
        return complete(self.kept, self.parameters)
