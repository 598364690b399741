"""The batches of rollouts that an earlier run stored, in place of newly sampled ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlpretrain.config import ConfigError
from rlpretrain.models.spending import Reads
from rlpretrain.types import Batch
from rollout.store import Store, StoreError


def rollouts_in(folder: str) -> Path:
    """The folder of stored rollouts: `folder` itself, or the one inside a run's folder."""
    inside = Path(folder) / "rollouts"
    return inside if inside.is_dir() else Path(folder)


class ReplaySource:
    """The batches of a store, step by step, in place of a BatchSource; its engine reads nothing."""

    epoch, without, exhausted = 0, 0, None

    def __init__(self, store: Store, max_steps: int | None = None, tokenizer: str | None = None):
        self.store, self.steps, self.done, self.reads = store, store.steps(), 0, Reads()
        self.tokenizer = tokenizer  # its fingerprint: a resumed replay needs the same
        self.planned = min(max_steps or len(self.steps), len(self.steps))
        first_missing = next((i for i, step in enumerate(self.steps, 1) if i != step), 1)
        self.facts = self._read(first_missing)[2]

    def take(self, n: int, ahead: int = 0) -> Batch:
        """The groups and documents of the next step, however many there are."""
        self.done += 1
        groups, documents, _ = self._read(self.done)
        return Batch(tuple(groups), tuple(documents), (self.done - 1) / max(self.planned, 1))

    def state_dict(self) -> dict[str, Any]:
        """The cursor."""
        return {"done": self.done, "tokenizer_ids": self.tokenizer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a cursor that `state_dict` gave."""
        saved = state.get("tokenizer_ids")  # None in an older checkpoint
        if None not in (saved, self.tokenizer) and saved != self.tokenizer:
            raise ConfigError(
                "the tokenizer is another one than when this replay was checkpointed: its ids mean other "
                "texts; set model.path or model.tokenizer back"
            )
        self.done = state["done"]

    def source_row(self) -> dict[str, float]:
        """Nothing: a replay draws no documents."""
        return {}

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Does nothing: no thoughts are being sampled."""
        yield

    def close(self) -> None:
        """Does nothing: there is nothing to release."""

    def _read(self, step: int) -> Any:
        try:
            return self.store.read(step)
        except StoreError as error:
            raise ConfigError(f"replay: {error}") from error
