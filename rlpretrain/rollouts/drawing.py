"""Draws documents from a source, prepared by the objective, and keeps positions that wait for their step."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rlpretrain.config import ConfigError
from rlpretrain.data.document_source import DocumentSource, SourceInputs, problem_of, take_documents
from rlpretrain.data.mixture import Mixture
from rlpretrain.data.stream import open_source
from rlpretrain.objectives import Objective
from rlpretrain.types import Document
from rollout.store import document_from_row, document_to_row
from rollout.types import Position

PATIENCE = 10_000
"""Documents in a row that are dropped, or have no position, after which a run gives up."""
DATA, NTP_DATA, EVALUATION = 1, 2, 3
"""Kinds of draws: `prepare` has its own random numbers in each, apart from those of the positions."""


@dataclass(frozen=True, slots=True)
class Draw:
    """A document that was drawn, and its number in the order of draws over all ranks."""

    document: Document
    number: int


class DocumentDraws:
    """Draws the documents of one rank.

    Everything random about the i-th draw of the global order depends on (seed, i) alone.
    """

    def __init__(
        self,
        source: DocumentSource,
        *,
        seed: int,
        rank: int,
        size: int,
        kind: int = DATA,
        id_prefix: str = "",
    ):
        self.source, self.seed, self.rank, self.size = source, seed, rank, size
        self.kind, self.id_prefix = kind, id_prefix
        self.drawn = 0  # documents of this rank
        self.done: set[int] = (
            set()
        )  # numbers to come that another rank drew, before ranks were added or removed
        self.dropped = 0  # of those, documents that `prepare` dropped
        self.by_stream: dict[str, list[int]] = {}  # documents and tokens that were drawn from each source

    def take(self, n: int, objective: Objective) -> list[Draw]:
        """The next `n` draws, without the documents that the objective drops.

        Of a mixture, `n` to think in, with the documents to read that are drawn before them.
        """
        draws = []
        for number, document in self._next_documents(n, objective.progress):
            self._count(document)
            if self.id_prefix:
                document = replace(document, id=f"{self.id_prefix}{document.id}")
            prepared = prepare_document(objective, document, (self.seed, number, self.kind))
            if prepared is None:
                self.dropped += 1
            else:
                draws.append(Draw(_with_own_id(prepared, document), number))
        return draws

    def _next_documents(self, n: int, progress: float) -> list[tuple[int, Document]]:
        """Documents with the numbers of their draws in the order over all ranks."""
        if isinstance(self.source, Mixture):
            return self._next_of_mixture(self.source, n, progress)
        numbered: list[tuple[int, Document]] = []
        while len(numbered) < n:
            first, wanted = self.drawn, n - len(numbered)
            self.drawn += wanted
            for k, document in enumerate(take_documents(self.source, wanted, progress)):
                number = (first + k) * self.size + self.rank
                if number in self.done:
                    self.done.remove(number)
                else:
                    numbered.append((number, document))
        return numbered

    def _next_of_mixture(self, mixture: Mixture, n: int, progress: float) -> list[tuple[int, Document]]:
        """As `_next_documents`; documents that are only read do not count."""
        numbered: list[tuple[int, Document]] = []
        while n:
            mixed, n = mixture.take_numbered(n, progress), 0
            self.drawn += len(mixed)
            for item in mixed:
                if item.number in self.done:
                    self.done.remove(item.number)
                    n += not mixture.is_only_read(item.document)
                else:
                    numbered.append((item.number, item.document))
        return numbered

    def _count(self, document: Document) -> None:
        if document.stream:
            documents, tokens = self.by_stream.get(document.stream, (0, 0))
            self.by_stream[document.stream] = [documents + 1, tokens + len(document.token_ids)]

    def fill(self, n: int, objective: Objective) -> list[Document]:
        """The next `n` documents that the objective does not drop."""
        documents: list[Document] = []
        dropped_in_row = 0
        while len(documents) < n:
            wanted = n - len(documents)
            draws = self.take(wanted, objective)
            documents += [draw.document for draw in draws]
            dropped_in_row = 0 if draws else dropped_in_row + wanted
            if dropped_in_row >= PATIENCE:
                raise ConfigError(
                    f"{type(objective).__name__}.prepare dropped {dropped_in_row} documents in a row"
                )
        return documents


def prepare_document(objective: Objective, document: Document, key: Sequence[int]) -> Document | None:
    """The document as the objective prepares it, None if it is dropped; `key` seeds its random numbers.

    Raises ConfigError that names the objective for a result that cannot be trained on.
    """
    if getattr(objective.prepare, "__func__", None) is Objective.prepare:
        return document
    return _checked(objective, document, objective.prepare(document, np.random.default_rng(key)))


def prepare_held_out(objective: Objective, document: Document, seed: int) -> Document | None:
    """`prepare_document` for an evaluation: its random numbers depend on `seed` and the document's id."""
    rng = np.random.default_rng((seed, document_number(document.id), EVALUATION))
    return _checked(objective, document, objective.prepare_held_out(document, rng))


def _checked(objective: Objective, document: Document, prepared: Document | None) -> Document | None:
    """What the objective made of a document; ConfigError if it cannot be trained on."""
    if prepared is None or prepared is document:
        return prepared
    if problem := problem_of(prepared):
        raise ConfigError(f"{type(objective).__name__}.prepare: document {document.id}: {problem}")
    return prepared if prepared.stream == document.stream else replace(prepared, stream=document.stream)


def inspect_documents(objective: Objective, inputs: SourceInputs) -> None:
    """Show documents of `data` to an objective that asks for them (`Objective.inspect`).

    Sources of a mixture come in turn, each up to the end of its pass.
    """
    if getattr(objective.inspect, "__func__", None) is Objective.inspect:
        return
    parts = [source.texts() for source in inputs.config.sources.values() if not source.is_off]
    sources = [
        open_source(replace(inputs, config=part, rank=0, world_size=1)) for part in parts or [inputs.config]
    ]
    objective.inspect(_one_pass(sources))


def _one_pass(sources: list[DocumentSource]) -> Iterator[Document]:
    while sources:
        for source in sources:
            yield from take_documents(source, 1, 0.0)
        sources = [source for source in sources if not source.epoch]


def document_number(document_id: str) -> int:
    """A number for a document, the same in every process."""
    return zlib.crc32(document_id.encode())


def _with_own_id(prepared: Document, document: Document) -> Document:
    """The prepared document, with an id of its own if it kept one that stands for other tokens.

    A document that is drawn twice for one batch may be prepared in two ways, and ids tell them apart.
    """
    same = prepared.token_ids == document.token_ids and prepared.scores == document.scores
    if same or prepared.id != document.id:
        return prepared
    content = np.asarray(prepared.token_ids, np.int64).tobytes()
    content += np.asarray(prepared.scores or (), np.float64).tobytes()
    return replace(prepared, id=f"{prepared.id}#{zlib.crc32(content):08x}")


@dataclass(frozen=True, slots=True)
class DrawnPosition:
    """A position of a drawn document, the seed of its thoughts, and the number of the draw.

    All positions of one draw share its number; a document that is drawn again has another. The number is None
    in older checkpoints.
    """

    document: Document
    position: Position
    seed: int
    draw: int | None

    def to_row(self) -> dict[str, Any]:
        """A position that waits for its step, with its document, as a checkpoint keeps it."""
        position = self.position
        is_document_start = position.context_ids == self.document.token_ids[: position.index]
        return {
            "document": document_to_row(self.document),
            "index": position.index,
            "context_ids": None if is_document_start else position.context_ids,
            "target_ids": position.target_ids,
            "suffix_ids": position.suffix_ids,
            "seed": self.seed,
            "draw": self.draw,
        }

    @classmethod
    def from_row(cls, row: Any) -> DrawnPosition:
        """What `to_row` wrote, or an older checkpoint's tuple without `meta` and `answer_at`."""
        if not isinstance(row, dict):
            return cls._from_tuple(row)
        document, index, context = document_from_row(row["document"]), row["index"], row["context_ids"]
        if context is None:
            context = document.token_ids[:index]
        target, suffix = tuple(row["target_ids"]), tuple(row["suffix_ids"])
        position = Position(document.id, index, tuple(context), target, suffix)
        return cls(document, position, row["seed"], row.get("draw"))

    @classmethod
    def _from_tuple(cls, row: Any) -> DrawnPosition:
        document_id, ids, source, index, seed, target_length, suffix = row
        document = Document(document_id, tuple(ids), source)
        target = document.token_ids[index : index + target_length]
        position = Position(document.id, index, document.token_ids[:index], target, tuple(suffix))
        return cls(document, position, seed, None)
