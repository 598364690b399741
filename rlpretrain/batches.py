"""Documents → positions → groups: what a step trains on, drawn so that ranks, resume and replay see the same thing."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlpretrain.config import ConfigError
from rlpretrain.documents import DocumentStream
from rlpretrain.lengths import check_engine
from rlpretrain.objectives import Objective
from rlpretrain.packing import Layout, count, pack
from rlpretrain.types import Batch, Document, MicroBatch
from rollout.engine import Engine
from rollout.queue import Rollout, RolloutQueue, Ticket
from rollout.store import Store, StoreError, document_from_row, document_to_row
from rollout.types import Group, Position

PATIENCE = 10_000
"""Documents in a row without a single position after which a run gives up."""


class BatchSource:
    """Draws the batches of one rank.

    Everything random about the i-th document of the global order (its positions, the seeds of its thoughts) depends on
    (seed, i) alone, so one rank and several, and a resumed run, think at the same places.
    """

    def __init__(self, objective: Objective, stream: DocumentStream, engine: Engine | None, policy: Any, *, seed: int, rank: int,
                 size: int, ntp_stream: DocumentStream | None = None, token_budget: int = 16384, in_flight: int = 4,
                 steps: int = 1):  # fmt: skip
        self.objective, self.stream, self.engine, self.policy = objective, stream, engine, policy
        self.ntp_stream, self.seed, self.rank, self.size = ntp_stream, seed, rank, size
        self.token_budget, self.steps = token_budget, steps
        if objective.has_positions:
            check_engine(objective, stream.longest, getattr(engine, "max_model_len", None))
        self.queue = RolloutQueue(in_flight)
        self._ahead: list[tuple[list[tuple[Document, Position, int]], Ticket]] = []  # submitted, not yet taken
        self.taken = 0  # batches
        self.drawn = 0  # documents this rank has drawn
        self.without = 0  # of those, documents with no position
        self._spare: list[tuple[Document, Position, int]] = []

    def take(self, n: int, ahead: int = 0) -> Batch:
        """`n` groups of this rank with their documents; for an objective without positions, `n` documents.

        `ahead`: how many coming batches of `n` to have sampled meanwhile. Positions are drawn here, in the trainer's thread,
        since they may need the policy.
        """
        if not self.objective.has_positions:
            traces = self._others(self.objective.mix(n))
            return Batch((), self.stream.take(n - len(traces)) + traces)
        while len(self._ahead) <= ahead:
            self.objective.progress = (self.taken + len(self._ahead)) / self.steps
            chosen = self._positions(n)
            self._ahead.append((chosen, self.queue.submit(self._pieces(chosen, ahead))))
        chosen, ticket = self._ahead.pop(0)
        self.taken += 1
        try:
            groups = self.queue.result(ticket)
        except ValueError as error:
            raise ConfigError(f"cannot sample thoughts: {error}") from error
        documents = list({d.id: d for d, *_ in chosen}.values())
        if self.ntp_stream is not None:
            documents = self._others(len(documents))
        return Batch(tuple(groups), tuple(documents))

    def _others(self, n: int) -> list[Document]:
        """The next `n` documents of `ntp_data`, by ids of their own: rows of both streams are numbered from 0."""
        found = self.ntp_stream.take(n) if self.ntp_stream is not None else []
        return [replace(d, id=f"ntp {d.id}") for d in found]

    def _pieces(self, chosen: Sequence[tuple[Document, Position, int]], ahead: int) -> list[Rollout]:
        """The rollouts of a batch: one call of the engine, or several if weights may change between them."""
        size = math.ceil(len(chosen) / self.queue.in_flight) if ahead else len(chosen)
        parts = [chosen[i : i + size] for i in range(0, len(chosen), size)]
        return [partial(self.objective.rollout, self.engine, [p for _, p, _ in part], [s for *_, s in part]) for part in parts]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """While weights change: what is being sampled is finished first, and nothing else is begun."""
        self.queue.pause()
        try:
            yield
        finally:
            self.queue.resume()

    def close(self) -> None:
        """Give up what is being sampled."""
        self.queue.close()

    def _positions(self, n: int) -> list[tuple[Document, Position, int]]:
        chosen, self._spare = self._spare[:n], self._spare[n:]
        barren = 0
        while len(chosen) < n:
            documents = self.stream.take(n - len(chosen))
            entropies = [None] * len(documents)
            if "entropy" in self.objective.needs:
                entropies = token_entropies(documents, lambda m: self.policy.score(m, want="entropies")[1], self.token_budget)
            for document, entropy in zip(documents, entropies, strict=True):
                order = self.drawn * self.size + self.rank
                self.drawn += 1
                rng = np.random.default_rng((self.seed, order))
                found = self.objective.positions(document, rng, entropy)
                chosen += [(document, p, int(rng.integers(2**62))) for p in found]
                barren = 0 if found else barren + 1
                self.without += not found
            if barren >= PATIENCE:
                raise ConfigError(
                    f"{barren} documents in a row gave no position: the objective's `positions` "
                    f"({self.objective.config.positions}), `min_context` or `target_length` do not fit this data"
                )
        chosen, self._spare = chosen[:n], chosen[n:] + self._spare
        return chosen

    @property
    def epoch(self) -> float:
        """Passes over the data so far."""
        return self.stream.epoch

    def state_dict(self) -> dict[str, Any]:
        """The exact cursor."""
        waiting = [place for chosen, _ in self._ahead for place in chosen]  # a resumed run samples them anew
        spare = [_place_to_row(*place) for place in waiting + self._spare]
        return {
            "stream": self.stream.state_dict(), "taken": self.taken, "drawn": self.drawn, "without": self.without, "spare": spare,
            "ntp_stream": self.ntp_stream.state_dict() if self.ntp_stream else None,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a cursor that `state_dict` gave."""
        self.stream.load_state_dict(state["stream"])
        self.taken, self.drawn, self.without = state["taken"], state["drawn"], state["without"]
        self._spare = [_place_from_row(row) for row in state["spare"]]
        if self.ntp_stream is not None:
            self.ntp_stream.load_state_dict(state["ntp_stream"])


def _place_to_row(document: Document, position: Position, seed: int) -> dict[str, Any]:
    """A position that waits for its step, with its document, as a checkpoint keeps it."""
    start = document.token_ids[: position.index]
    context = None if position.context_ids == start else position.context_ids
    return {"document": document_to_row(document), "index": position.index, "context_ids": context,
            "target_ids": position.target_ids, "suffix_ids": position.suffix_ids, "seed": seed}


def _place_from_row(row: Any) -> tuple[Document, Position, int]:
    """What `_place_to_row` wrote, or an older checkpoint's tuple without `meta` and `answer_at`."""
    if not isinstance(row, dict):
        id_, ids, source, index, seed, size, suffix = row
        document = Document(id_, tuple(ids), source)
        context, target = document.token_ids[:index], document.token_ids[index : index + size]
    else:
        document, index, seed = document_from_row(row["document"]), row["index"], row["seed"]
        context, target, suffix = row["context_ids"], row["target_ids"], row["suffix_ids"]
        context = document.token_ids[:index] if context is None else context
    return document, Position(document.id, index, tuple(context), tuple(target), tuple(suffix)), seed


def rollouts_in(folder: str) -> Path:
    """The folder of kept rollouts, given itself or as the run's that kept them."""
    inside = Path(folder) / "rollouts"
    return inside if inside.is_dir() else Path(folder)


class ReplaySource:
    """The batches of a store, step by step; in place of a BatchSource."""

    epoch, without = 0, 0

    def __init__(self, store: Store):
        self.store, self.steps, self.done = store, store.steps(), 0
        missing = next((i for i, step in enumerate(self.steps, 1) if i != step), 1)
        self.facts = self._read(missing)[2]

    def take(self, n: int, ahead: int = 0) -> Batch:
        """The groups and documents of the next step, however many there are."""
        self.done += 1
        groups, documents, _ = self._read(self.done)
        return Batch(tuple(groups), tuple(documents))

    def state_dict(self) -> dict[str, Any]:
        """The cursor."""
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a cursor that `state_dict` gave."""
        self.done = state["done"]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing is being sampled."""
        yield

    def close(self) -> None:
        """Nothing to release."""

    def _read(self, step: int) -> Any:
        try:
            return self.store.read(step)
        except StoreError as error:
            raise ConfigError(f"replay: {error}") from error


def roll_out(objective: Objective, engine: Any, positions: Sequence[Position], seeds: Sequence[int]) -> list[Group]:
    """The objective's groups; ConfigError for what the engine refuses to sample."""
    try:
        return asyncio.run(objective.rollout(engine, positions, seeds))
    except ValueError as error:
        raise ConfigError(f"cannot sample thoughts: {error}") from error


@torch.no_grad()
def token_entropies(documents: Sequence[Document], score: Callable[[MicroBatch], Tensor], token_budget: int) -> list[Tensor]:
    """Per document, the entropy (nats) of a model's prediction of each token, 0 for the first; `score` gives the trunk's."""
    batch = Batch((), documents)
    out: dict[str, Tensor] = {}
    for micro in pack(batch, Layout(token_budget), count(batch)):
        sizes = [len(d.token_ids) - 1 for d in micro.documents]
        for d, e in zip(micro.documents, score(micro).split(sizes), strict=True):
            out[d.id] = torch.cat([e.new_zeros(1), e]).cpu()
    return [out[d.id] for d in documents]
