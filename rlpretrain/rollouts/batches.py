"""Documents → positions → groups: what a step trains on, drawn so that ranks, resume and replay see the
same thing.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from rlpretrain.config import ConfigError
from rlpretrain.data.stream import DocumentStream
from rlpretrain.models.lengths import check_engine
from rlpretrain.models.spending import Metered, Reads
from rlpretrain.objectives import Objective
from rlpretrain.scoring.groups import token_entropies
from rlpretrain.types import Batch, Document
from rollout.engine import Engine
from rollout.queue import Rollout, RolloutQueue, Ticket
from rollout.store import Store, StoreError, document_from_row, document_to_row
from rollout.types import Group, Position

PATIENCE = 10_000
"""Documents in a row without a single position after which a run gives up."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where to think: a position of a document that was drawn, the seed of its thoughts, and the draw's
    number.

    Several positions of one draw share the number; a document that is drawn again has another.
    """

    document: Document
    position: Position
    seed: int
    draw: int | None


@dataclass(frozen=True, slots=True)
class Ahead:
    """A batch whose thoughts are being sampled; `progress` is how far the run will be with it."""

    places: list[Place]
    ticket: Ticket
    progress: float
    reads: Reads


class BatchSource:
    """Draws the batches of one rank.

    Everything random about the i-th document of the global order (its positions, the seeds of its thoughts)
    depends on (seed, i) alone, so one rank and several, and a resumed run, think at the same places.
    """

    def __init__(
        self,
        objective: Objective,
        stream: DocumentStream,
        engine: Engine | None,
        policy: Any,
        *,
        seed: int,
        rank: int,
        size: int,
        ntp_stream: DocumentStream | None = None,
        token_budget: int = 16384,
        in_flight: int = 4,
        steps: int = 1,
    ):
        self.objective, self.stream, self.engine, self.policy = objective, stream, engine, policy
        self.ntp_stream, self.seed, self.rank, self.size = ntp_stream, seed, rank, size
        self.token_budget, self.steps = token_budget, steps
        if objective.has_positions and engine is not None:
            check_engine(objective, stream.longest, engine.info.max_model_len)
        self.queue = RolloutQueue(in_flight)
        self.reads = Reads()  # of the engine, for the batches that were taken
        self._ahead: list[Ahead] = []  # submitted, not yet taken
        self.taken = 0  # batches
        self.drawn = 0  # documents this rank has drawn
        self.without = 0  # of those, documents with no position
        self._spare: list[Place] = []

    def take(self, n: int, ahead: int = 0) -> Batch:
        """`n` groups of this rank with their documents; for an objective without positions, `n` documents.

        `ahead`: how many coming batches of `n` to have sampled meanwhile. Positions are drawn here, in the
        trainer's thread, since they may need the policy.
        """
        if not self.objective.has_positions:
            objective = self.objective.at(self.taken / self.steps)
            self.taken += 1
            traces = self._others(objective.mix(n))
            return Batch((), self.stream.take(n - len(traces)) + traces, objective.progress)
        while len(self._ahead) <= ahead:
            objective = self.objective.at((self.taken + len(self._ahead)) / self.steps)
            places = self._positions(n, objective)
            engine = Metered(self.engine)
            ticket = self.queue.submit(self._pieces(places, objective, engine, ahead))
            self._ahead.append(Ahead(places, ticket, objective.progress, engine.reads))
        batch = self._ahead.pop(0)
        self.taken += 1
        try:
            groups = self.queue.result(batch.ticket)
        except ValueError as error:
            raise ConfigError(f"cannot sample thoughts: {error}") from error
        self.reads.merge(batch.reads)
        documents = list({place.draw: place.document for place in batch.places}.values())
        if self.ntp_stream is not None:
            documents = self._others(len(documents))
        return Batch(tuple(groups), tuple(documents), batch.progress)

    def _others(self, n: int) -> list[Document]:
        """The next `n` documents of `ntp_data`, by ids of their own: rows of both streams are numbered
        from 0.
        """
        found = self.ntp_stream.take(n) if self.ntp_stream is not None else []
        return [replace(d, id=f"ntp {d.id}") for d in found]

    def _pieces(
        self, places: Sequence[Place], objective: Objective, engine: Metered, ahead: int
    ) -> list[Rollout]:
        """The rollouts of a batch: one call of the engine, or several if weights may change between them."""
        size = math.ceil(len(places) / self.queue.in_flight) if ahead else len(places)
        parts = [places[i : i + size] for i in range(0, len(places), size)]
        return [
            partial(objective.rollout, engine, [p.position for p in part], [p.seed for p in part])
            for part in parts
        ]

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

    def _positions(self, n: int, objective: Objective) -> list[Place]:
        chosen, self._spare = self._spare[:n], self._spare[n:]
        barren = 0
        while len(chosen) < n:
            documents = self.stream.take(n - len(chosen))
            entropies = [None] * len(documents)
            if "entropy" in objective.needs:
                score = partial(self.policy.score, entropies=True)
                entropies = token_entropies(score, documents, self.token_budget, self.policy.ranks.device)
            for document, entropy in zip(documents, entropies, strict=True):
                order = self.drawn * self.size + self.rank
                self.drawn += 1
                rng = np.random.default_rng((self.seed, order))
                found = objective.positions(document, rng, entropy)
                chosen += [Place(document, p, int(rng.integers(2**62)), order) for p in found]
                barren = 0 if found else barren + 1
                self.without += not found
            if barren >= PATIENCE:
                raise ConfigError(
                    f"{barren} documents in a row gave no position: the objective's `positions` "
                    f"({objective.config.positions}), `min_context` or `target_length` do not fit this data"
                )
        chosen, self._spare = chosen[:n], chosen[n:] + self._spare
        return chosen

    @property
    def epoch(self) -> float:
        """Passes over the data so far."""
        return self.stream.epoch

    def state_dict(self) -> dict[str, Any]:
        """The exact cursor."""
        waiting = [
            place for batch in self._ahead for place in batch.places
        ]  # a resumed run samples them anew
        spare = [_place_to_row(place) for place in waiting + self._spare]
        return {
            "stream": self.stream.state_dict(),
            "taken": self.taken,
            "drawn": self.drawn,
            "without": self.without,
            "spare": spare,
            "ntp_stream": self.ntp_stream.state_dict() if self.ntp_stream else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a cursor that `state_dict` gave."""
        self.stream.load_state_dict(state["stream"])
        self.taken, self.drawn, self.without = state["taken"], state["drawn"], state["without"]
        spare = [_place_from_row(row) for row in state["spare"]]
        first = {place.document.id: -1 - k for k, place in reversed(list(enumerate(spare)))}
        # checkpoints that name no draw: a document's positions are of one
        self._spare = [p if p.draw is not None else replace(p, draw=first[p.document.id]) for p in spare]
        if self.ntp_stream is not None:
            self.ntp_stream.load_state_dict(state["ntp_stream"])


def _place_to_row(place: Place) -> dict[str, Any]:
    """A position that waits for its step, with its document, as a checkpoint keeps it."""
    document, position = place.document, place.position
    start = document.token_ids[: position.index]
    context = None if position.context_ids == start else position.context_ids
    return {
        "document": document_to_row(document),
        "index": position.index,
        "context_ids": context,
        "target_ids": position.target_ids,
        "suffix_ids": position.suffix_ids,
        "seed": place.seed,
        "draw": place.draw,
    }


def _place_from_row(row: Any) -> Place:
    """What `_place_to_row` wrote, or an older checkpoint's tuple without `meta` and `answer_at`."""
    if not isinstance(row, dict):
        id_, ids, source, index, seed, size, suffix = row
        document, draw = Document(id_, tuple(ids), source), None
        context, target = document.token_ids[:index], document.token_ids[index : index + size]
    else:
        document, index, seed = document_from_row(row["document"]), row["index"], row["seed"]
        context, target, suffix = row["context_ids"], row["target_ids"], row["suffix_ids"]
        context, draw = document.token_ids[:index] if context is None else context, row.get("draw")
    return Place(
        document, Position(document.id, index, tuple(context), tuple(target), tuple(suffix)), seed, draw
    )


def rollouts_in(folder: str) -> Path:
    """The folder of kept rollouts, given itself or as the run's that kept them."""
    inside = Path(folder) / "rollouts"
    return inside if inside.is_dir() else Path(folder)


class ReplaySource:
    """The batches of a store, step by step; in place of a BatchSource. It samples nothing, and `reads`
    says so.
    """

    epoch, without = 0, 0

    def __init__(self, store: Store, max_steps: int | None = None, tokenizer: str | None = None):
        self.store, self.steps, self.done, self.reads = store, store.steps(), 0, Reads()
        self.tokenizer = tokenizer  # its fingerprint: a resumed replay has the same
        self.planned = min(max_steps or len(self.steps), len(self.steps))
        missing = next((i for i, step in enumerate(self.steps, 1) if i != step), 1)
        self.facts = self._read(missing)[2]

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
        known = state.get("tokenizer_ids")  # None in an older checkpoint
        if None not in (known, self.tokenizer) and known != self.tokenizer:
            raise ConfigError(
                "the tokenizer is another one than when this replay was checkpointed: its ids mean other "
                "texts; set model.path or model.tokenizer back"
            )
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


def roll_out(
    objective: Objective, engine: Any, positions: Sequence[Position], seeds: Sequence[int]
) -> list[Group]:
    """The objective's groups; ConfigError for what the engine refuses to sample."""
    try:
        return asyncio.run(objective.rollout(engine, positions, seeds))
    except ValueError as error:
        raise ConfigError(f"cannot sample thoughts: {error}") from error
