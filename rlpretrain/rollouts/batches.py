"""Documents → positions → groups: what a step trains on.

Draws do not depend on the number of ranks, on a resume, or on how far ahead thoughts are sampled.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from rlpretrain.config import ConfigError
from rlpretrain.data.document_source import DocumentSource, cursor_of
from rlpretrain.data.mixture import Mixture
from rlpretrain.models.lengths import check_engine, check_rows, limit_of
from rlpretrain.models.spending import Metered, Reads
from rlpretrain.objectives import Objective
from rlpretrain.rollouts import drawing
from rlpretrain.rollouts.drawing import DocumentDraws, Draw, DrawnPosition
from rlpretrain.scoring.groups import token_entropies
from rlpretrain.types import Batch, Document
from rollout.blocking import wait_for_result
from rollout.engine import Engine
from rollout.queue import Rollout, RolloutQueue, Ticket
from rollout.store import document_from_row, document_to_row
from rollout.types import Group, Position


@dataclass(frozen=True, slots=True)
class SubmittedBatch:
    """A batch whose thoughts are being sampled; `progress` is how far the run will be with it."""

    positions: list[DrawnPosition]
    ticket: Ticket
    progress: float
    reads: Reads
    read_documents: list[Document]
    """Documents in which no position is chosen."""
    exhausted: str | None
    """Why the run ends with this batch."""
    shares: dict[str, float]
    """The share of each named source when its documents were drawn."""


class BatchSource:
    """Draws the batches of one rank.

    Everything random about the i-th draw of the global order (how the document is prepared, its positions,
    the seeds of its thoughts) depends on (seed, i) alone. So one rank and several, and a resumed run, think
    at the same positions.
    """

    def __init__(
        self,
        objective: Objective,
        stream: DocumentSource,
        engine: Engine | None,
        policy: Any,
        *,
        seed: int,
        rank: int,
        size: int,
        ntp_stream: DocumentSource | None = None,
        token_budget: int = 16384,
        in_flight: int = 4,
        steps: int = 1,
    ):
        self.objective, self.stream, self.engine, self.policy = objective, stream, engine, policy
        self.ntp_stream, self.seed, self.size = ntp_stream, seed, size
        self.mixture = stream if isinstance(stream, Mixture) else None
        self.token_budget, self.steps = token_budget, steps
        self._longest = stream.longest  # tokens of a document for which lengths are known to fit
        self._waits = True  # weights wait for calls of the engine
        if objective.has_positions and engine is not None:
            check_engine(objective, self._longest, engine.info.max_model_len)
            self._waits = not engine.info.updates_in_flight
        self._draws = DocumentDraws(stream, seed=seed, rank=rank, size=size)
        self._ntp_draws = None
        if ntp_stream is not None:
            self._ntp_draws = DocumentDraws(
                ntp_stream, seed=seed, rank=rank, size=size, kind=drawing.NTP_DATA, id_prefix="ntp "
            )
        self.queue = RolloutQueue(in_flight)
        self.reads = Reads()  # of the engine, for the batches that were taken
        self.taken = 0  # batches
        self._without_position = 0  # documents
        self._submitted: list[SubmittedBatch] = []  # not yet taken
        self._spare: list[DrawnPosition] = []  # chosen for a batch that had enough
        # (documents to read, why the run ends, shares) of batches that waited when the checkpoint was written
        self._restored: list[tuple[list[Document], str | None, dict[str, float]]] = []
        self._shares: dict[str, float] = {}  # of the sources in the batch that was taken last
        self.exhausted: str | None = None  # why the run ends with the batch that was taken last

    def take(self, n: int, ahead: int = 0) -> Batch:
        """`n` groups of this rank with their documents; for an objective without positions, `n` documents.

        `ahead`: how many coming batches of `n` to have sampled meanwhile. Positions are chosen here, in the
        trainer's thread, since they may need the policy.
        """
        if not self.objective.has_positions:
            return self._take_documents(n)
        while len(self._submitted) <= ahead:
            self._submit(n, ahead)
        return self._collect(self._submitted.pop(0))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """While weights change: calls of the engine are finished first, and no other begins.

        An engine whose weights change in flight holds calls itself.
        """
        if not self._waits:
            yield
            return
        self.queue.pause()
        try:
            yield
        finally:
            self.queue.resume()

    def close(self) -> None:
        """Give up what is being sampled."""
        self.queue.close()

    @property
    def epoch(self) -> float:
        """Passes over the data so far."""
        return self.stream.epoch

    @property
    def drawn(self) -> int:
        """Documents that this rank has drawn."""
        return self._draws.drawn

    def source_row(self) -> dict[str, float]:
        """Metrics of the named sources; documents and tokens are those of this rank."""
        if self.mixture is None:
            return {}
        row: dict[str, float] = {}
        shares, epochs = self._shares, self.mixture.epochs
        for name in self.mixture.sources:
            documents, tokens = self._draws.by_stream.get(name, (0, 0))
            row[f"source/{name}/documents"], row[f"source/{name}/tokens"] = documents, tokens
            row[f"source/{name}/weight"], row[f"source/{name}/epoch"] = shares[name], epochs[name]
        return row

    @property
    def without(self) -> int:
        """Drawn documents that have no position, or that the objective's `prepare` dropped."""
        dropped = self._draws.dropped + (self._ntp_draws.dropped if self._ntp_draws else 0)
        return self._without_position + dropped

    def state_dict(self) -> dict[str, Any]:
        """The exact cursor. Positions whose thoughts are being sampled are sampled again after a resume."""
        waiting = [position for batch in self._submitted for position in batch.positions]
        state = {
            "stream": cursor_of(self.stream),
            "taken": self.taken,
            "drawn": self._draws.drawn,
            "done": sorted(self._draws.done),
            "dropped": self._draws.dropped,
            "by_stream": {name: list(counts) for name, counts in self._draws.by_stream.items()},
            "without": self._without_position,
            "spare": [position.to_row() for position in waiting + self._spare],
            "waiting": [
                {
                    "read_documents": list(map(document_to_row, documents)),
                    "exhausted": exhausted,
                    "shares": shares,
                }
                for documents, exhausted, shares in self._waiting()
            ],
            "exhausted": self.exhausted,
            "ntp_stream": None,
        }
        if self._ntp_draws is not None:
            state["ntp_stream"] = cursor_of(self._ntp_draws.source)
            state["ntp_drawn"], state["ntp_dropped"] = self._ntp_draws.drawn, self._ntp_draws.dropped
            state["ntp_done"] = sorted(self._ntp_draws.done)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a cursor that `state_dict` gave; older checkpoints lack some of its values."""
        self.stream.load_state_dict(state["stream"])
        self.taken, self._without_position = state["taken"], state["without"]
        self._draws.drawn, self._draws.dropped = state["drawn"], state.get("dropped", 0)
        self._draws.done = set(state.get("done", ()))
        self._draws.by_stream = {name: list(counts) for name, counts in state.get("by_stream", {}).items()}
        self._spare = _numbered([DrawnPosition.from_row(row) for row in state["spare"]])
        self._restored = [
            (
                list(map(document_from_row, batch["read_documents"])),
                batch["exhausted"],
                batch.get("shares", {}),
            )
            for batch in state.get("waiting", [])
        ]
        self.exhausted = state.get("exhausted")
        if self._ntp_draws is not None:
            self._ntp_draws.source.load_state_dict(state["ntp_stream"])
            self._ntp_draws.drawn = state.get("ntp_drawn", 0)
            self._ntp_draws.dropped = state.get("ntp_dropped", 0)
            self._ntp_draws.done = set(state.get("ntp_done", ()))

    def _waiting(self) -> list[tuple[list[Document], str | None, dict[str, float]]]:
        """What a batch that was not taken has beside its positions."""
        submitted = [(batch.read_documents, batch.exhausted, batch.shares) for batch in self._submitted]
        return submitted + self._restored

    def _take_documents(self, n: int) -> Batch:
        """A batch of an objective without positions."""
        objective = self.objective.at(self.taken / self.steps)
        self.taken += 1
        self._begin_draws(objective)
        traces = self._take_ntp_documents(objective.mix(n), objective)
        documents = self._draws.fill(n - len(traces), objective)
        self._check_longer(documents)
        self._shares = self._shares_at(objective.progress)
        self.exhausted = self.mixture.exhausted if self.mixture is not None else None
        return Batch((), documents + traces, objective.progress)

    def _begin_draws(self, objective: Objective) -> None:
        """Let a mixture change its weights, at a draw that no rank has reached. All ranks call it."""
        if self.mixture is not None:
            (first,) = self.policy.ranks.max([float(self.mixture.position)])
            self.mixture.begin(objective.progress, int(first))

    def _shares_at(self, progress: float) -> dict[str, float]:
        """The share of each named source in a batch that is drawn now."""
        return self.mixture.weights_at(progress) if self.mixture is not None else {}

    def _submit(self, n: int, ahead: int) -> None:
        """Choose the positions of the next batch and let the engine begin with its thoughts."""
        objective = self.objective.at((self.taken + len(self._submitted)) / self.steps)
        if self._restored:  # its draws were made before the checkpoint, perhaps on fewer ranks
            read_documents, exhausted, shares = self._restored.pop(0)
            drawn_at = None if self.mixture is None else self.mixture.progress
            again = objective if drawn_at is None else self.objective.at(drawn_at)
            positions = self._choose_positions(n, again, read_documents)
        else:
            self._begin_draws(objective)
            read_documents = []
            positions = self._choose_positions(n, objective, read_documents)
            exhausted = self.mixture.exhausted if self.mixture is not None else None
            shares = {}
        shares = shares or self._shares_at(objective.progress)  # an older checkpoint has none
        engine = Metered(self.engine)
        ticket = self.queue.submit(self._rollouts(positions, objective, engine, ahead))
        reads, progress = engine.reads, objective.progress
        self._submitted.append(
            SubmittedBatch(positions, ticket, progress, reads, read_documents, exhausted, shares)
        )

    def _collect(self, submitted: SubmittedBatch) -> Batch:
        """The batch once all its thoughts are sampled."""
        self.taken += 1
        try:
            groups = self.queue.result(submitted.ticket)
        except ValueError as error:
            raise ConfigError(f"cannot sample thoughts: {error}") from error
        self.reads.merge(submitted.reads)
        self._shares, self.exhausted = submitted.shares, submitted.exhausted
        by_draw = {position.draw: position.document for position in submitted.positions}
        documents = list(by_draw.values())
        if self.mixture is not None:
            documents = list(filter(self.mixture.has_next_token_loss, documents)) + submitted.read_documents
        if self._ntp_draws is not None:
            objective = self.objective.at(submitted.progress)
            documents = self._take_ntp_documents(len(documents), objective)
        return Batch(tuple(groups), tuple(documents), submitted.progress)

    def _rollouts(
        self, positions: Sequence[DrawnPosition], objective: Objective, engine: Any, ahead: int
    ) -> list[Rollout]:
        """The rollouts of a batch: one call of the engine, or several if weights may change between them."""
        size = math.ceil(len(positions) / self.queue.in_flight) if ahead else len(positions)
        rollouts = []
        for start in range(0, len(positions), size):
            part = positions[start : start + size]
            seeds = [drawn.seed for drawn in part]
            rollouts.append(partial(objective.rollout, engine, [drawn.position for drawn in part], seeds))
        return rollouts

    def _choose_positions(
        self, n: int, objective: Objective, read_documents: list[Document]
    ) -> list[DrawnPosition]:
        """The next `n` positions: spare ones, then those of new documents.

        Documents in which no position is chosen, since their source is only read, join `read_documents`.
        """
        chosen, self._spare = self._spare[:n], self._spare[n:]
        in_row = 0  # documents without a position since the last one with some
        while self._on_some_rank(len(chosen) < n):
            wanted = max(0, n - len(chosen))
            draws = self._draws.take(wanted, objective) if wanted else []
            if self.mixture is not None:
                is_read = [self.mixture.is_only_read(draw.document) for draw in draws]
                read = [draw.document for draw, reads in zip(draws, is_read, strict=True) if reads]
                self._check_read(read)
                read_documents += read
                draws = [draw for draw, reads in zip(draws, is_read, strict=True) if not reads]
            in_row += wanted - len(draws)
            documents = [draw.document for draw in draws]
            self._check_longer(documents)
            for draw, entropies in zip(draws, self._entropies(documents, objective), strict=True):
                positions = self._positions_of(draw, objective, entropies)
                chosen += positions
                in_row = 0 if positions else in_row + 1
                self._without_position += not positions
            if in_row >= drawing.PATIENCE:
                raise ConfigError(
                    f"{in_row} documents in a row gave no position: the objective's `positions` "
                    f"({objective.config.positions}), `min_context` or `target_length` do not fit this data"
                    + (f", or its `prepare` drops it ({self._draws.dropped})" if self._draws.dropped else "")
                )
        chosen, self._spare = chosen[:n], chosen[n:] + self._spare
        return chosen

    def _positions_of(self, draw: Draw, objective: Objective, entropies: Any) -> list[DrawnPosition]:
        rng = np.random.default_rng((self.seed, draw.number))
        positions = objective.positions(draw.document, rng, entropies)
        return [DrawnPosition(draw.document, p, int(rng.integers(2**62)), draw.number) for p in positions]

    def _entropies(self, documents: Sequence[Document], objective: Objective) -> Sequence[Any]:
        """Of each document, the entropies of its tokens if the objective needs them, else None."""
        if "entropy" not in objective.needs or not (documents or self._scores_together):
            return [None] * len(documents)
        score, ranks = partial(self.policy.score, entropies=True), self.policy.ranks
        together = ranks if self._scores_together else None
        return token_entropies(score, documents, self.token_budget, ranks.device, together)

    @property
    def _scores_together(self) -> bool:
        """Whether all ranks must score entropies equally often, since each has a part of the weights."""
        return "entropy" in self.objective.needs and not self.policy.shares_weights

    def _on_some_rank(self, value: bool) -> bool:
        """Whether `value` holds on some rank that scores together with this one, else on this one."""
        return bool(self.policy.ranks.max([float(value)])[0]) if self._scores_together else value

    def _take_ntp_documents(self, n: int, objective: Objective) -> list[Document]:
        """The next `n` documents of `ntp_data`; their ids begin with "ntp ", as both streams count from 0."""
        if self._ntp_draws is None:
            return []
        documents = self._ntp_draws.fill(n, objective)
        if (
            max((len(document.token_ids) for document in documents), default=0)
            > self._ntp_draws.source.longest
        ):
            self._check_read(documents)
        return documents

    def _check_read(self, documents: Sequence[Document]) -> None:
        """Check the lengths of documents that are only read, which `prepare` may have made longer."""
        limit = limit_of(self.policy.model) if documents else None
        if limit is None:
            return
        longest = max(documents, key=lambda document: len(document.token_ids))
        if len(longest.token_ids) > limit.tokens:
            raise ConfigError(
                f"{limit.reason}, but `prepare` gives document {longest.id} {len(longest.token_ids)} tokens"
            )

    def _check_longer(self, documents: Sequence[Document]) -> None:
        """Check lengths again if `prepare` made a document longer than all before."""
        longest = max((len(document.token_ids) for document in documents), default=0)
        if longest <= self._longest:
            return
        try:
            check_rows(self.objective, longest, limit_of(self.policy.model))
            if self.engine is not None:
                check_engine(self.objective, longest, self.engine.info.max_model_len)
        except ConfigError as error:
            raise ConfigError(
                f"{type(self.objective).__name__}.prepare makes documents longer: {error}"
            ) from None
        self._longest = longest


def roll_out(
    objective: Objective, engine: Any, positions: Sequence[Position], seeds: Sequence[int]
) -> list[Group]:
    """The objective's groups; ConfigError for what the engine refuses to sample."""
    try:
        return wait_for_result(objective.rollout(engine, positions, seeds))
    except ValueError as error:
        raise ConfigError(f"cannot sample thoughts: {error}") from error


def _numbered(positions: list[DrawnPosition]) -> list[DrawnPosition]:
    """Positions of an older checkpoint, which names no draws: those of one document are of one draw."""
    first_of = {p.document.id: -1 - k for k, p in reversed(list(enumerate(positions)))}
    return [p if p.draw is not None else replace(p, draw=first_of[p.document.id]) for p in positions]
