"""Documents from several named sources (`data.sources`), mixed by weights over the progress of the run."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np

from rlpretrain.config import ConfigError, SourceConfig
from rlpretrain.data.document_source import (
    DocumentSource,
    SourceInputs,
    count_documents,
    cursor_of,
    take_documents,
)
from rlpretrain.data.source_order import SourceOrder
from rlpretrain.types import Document

SAMPLE = 256
"""First documents whose mean length stands for that of a source that does not know its own."""
UNNAMED = "data"
"""A source of this name is drawn in the order in which `data` without `sources` is."""
Open = Callable[[SourceInputs, str], DocumentSource]
"""Opens one source, for a section of the configuration: `stream.open_source`."""


@dataclass(frozen=True, slots=True)
class NumberedDocument:
    """A document, and the number of its draw in the order over all ranks."""

    number: int
    document: Document


class Mixture:
    """Endless documents of one rank from several sources, resumable at any document.

    Every source has a cursor of its own and, from its name and the run's seed, random numbers of its own. So
    its documents come in the same order whatever the other sources and their weights are. Which source the
    next document is from is the same on every rank (`SourceOrder`). Each rank therefore follows all sources
    through the global order and skips the documents of the others; of a streamed source it reads all rows.

    The k-th draw belongs to rank k % world_size. With an objective that thinks, only draws to think in are
    counted, and what is drawn from sources with `use: read` before one of them belongs to the same rank: then
    one rank and several read the same documents between the same positions.

    A document's `stream` is the name of its source, and its id begins with it: "web/17".

    Raises ConfigError for a source that cannot be opened, or that is to be exhausted and has no known length.
    """

    def __init__(self, inputs: SourceInputs, open_one: Open, section: str = "data"):
        self.config, self.rank, self.world_size = inputs.config, inputs.rank, inputs.world_size
        self.sources: dict[str, DocumentSource] = {}
        self.mean_lengths: dict[str, float] = {}
        for name, settings in self.config.sources.items():
            own = replace(
                inputs,
                config=settings.texts(),
                rank=0,
                world_size=1,
                seed=seed_of(name, inputs.seed),
                min_length=inputs.min_length if settings.use == "think" else min(2, inputs.min_length),
            )
            reopen = partial(open_one, own, f"{section}.sources.{name}")
            self.sources[name] = reopen()
            if self.config.weights_count == "tokens":
                with _naming(name):
                    self.mean_lengths[name] = mean_length(self.sources[name], reopen)
        self._limits = {name: self._limit_of(name) for name in self.sources}
        self.order = SourceOrder(
            list(self.sources),
            block=inputs.per_step,
            seed=inputs.seed,
            limits={
                name: limit
                for name, limit in self._limits.items()
                if limit is not None and self.config.sources[name].exhausted == "renormalise"
            },
        )
        self.read_only: set[str] = set()  # sources in whose documents an objective that thinks does not
        if inputs.thinks:
            self.read_only = {name for name, source in self.config.sources.items() if source.use == "read"}
            self.order.required -= self.read_only
        self._counted = 0  # draws of all ranks before the order's position, by which draws are shared out
        self._taken_of = dict.fromkeys(self.sources, 0)  # documents of each source before its cursor
        self.progress: float | None = None  # at which the present weights were asked for
        self._online: dict[str, float] | None = None  # weights that replaced those of the configuration
        self._reached = 0  # draws that other ranks had passed before their number changed (redealing.py)

    def is_only_read(self, document: Document) -> bool:
        """Whether no position is chosen in a document of this mixture."""
        return document.stream in self.read_only

    def has_next_token_loss(self, document: Document) -> bool:
        """Whether the next-token loss of a document of this mixture is taken."""
        return self.config.sources[document.stream].next_token

    def begin(self, progress: float, first: int) -> None:
        """Draw with the weights at `progress` from draw `first` of the global order on.

        No rank may have reached that draw, and all ranks have to give the same two numbers.
        """
        self.progress = progress
        self.order.set_shares(self.document_shares(progress), max(first, self._reached))

    def replace_weights(self, weights: dict[str, float]) -> None:
        """Draw with these weights from the next `begin` on, whatever the progress. All ranks call it."""
        self._online = weights

    @property
    def position(self) -> int:
        """The draws of the global order that this rank has passed."""
        return self.order.position

    def weights_at(self, progress: float) -> dict[str, float]:
        """The weight of each source at a share of the run; they sum to 1."""
        sources = self.config.sources
        weights = self._online or {name: source.weight_at(progress) for name, source in sources.items()}
        total = sum(weights.values())
        return {name: weight / total for name, weight in weights.items()}

    def document_shares(self, progress: float) -> dict[str, float]:
        """The share of each source among the documents that are drawn, up to a factor."""
        weights = self.weights_at(progress)
        return {name: weight / self.mean_lengths.get(name, 1.0) for name, weight in weights.items()}

    def take(self, n: int, progress: float = 0.0) -> list[Document]:
        """The documents of `take_numbered`."""
        return [numbered.document for numbered in self.take_numbered(n, progress)]

    def take_numbered(self, n: int, progress: float = 0.0) -> list[NumberedDocument]:
        """The next `n` documents of this rank, by the weights at `progress`.

        With an objective that thinks, `n` to think in, and the documents to read that are drawn before them.
        """
        if progress != self.progress:
            self.begin(progress, -(-self.position // self.world_size) * self.world_size)
        own: list[tuple[int, str, int]] = []
        for _ in range(n):
            own += self._next_own_draws()
        documents: dict[tuple[str, int], Document] = {}
        for name in {name for _, name, _ in own}:
            numbers = [number for _, source, number in own if source == name]
            with _naming(name):
                taken = self._take_of(name, numbers)
            for number, document in zip(numbers, taken, strict=True):
                documents[name, number] = replace(document, id=f"{name}/{document.id}", stream=name)
        return [NumberedDocument(place, documents[name, number]) for place, name, number in own]

    @property
    def exhausted(self) -> str | None:
        """Why the run ends: a source with `exhausted: stop` is, or all sources are; None if it goes on."""
        for name, settings in self.config.sources.items():
            limit = self._limits[name]
            if settings.exhausted == "stop" and limit is not None and self.order.counts[name] > limit:
                return f"exhausted: source '{name}' has no documents left ({self._passes_of(name)})"
        if not self.order.is_over:
            return None
        return f"exhausted: no source{' to think in' * bool(self.read_only)} with a weight has documents left"

    @property
    def epoch(self) -> float:
        """Complete passes over the source with the most of them."""
        return max(source.epoch for source in self.sources.values())

    @property
    def epochs(self) -> dict[str, float]:
        """Complete passes over each source."""
        return {name: source.epoch for name, source in self.sources.items()}

    @property
    def longest(self) -> int:
        """Tokens of the longest document of the sources that are not only read."""
        return max(source.longest for name, source in self.sources.items() if name not in self.read_only)

    @property
    def longest_only_read(self) -> dict[str, int]:
        """Tokens of the longest document of each source that is only read."""
        return {name: self.sources[name].longest for name in sorted(self.read_only)}

    @property
    def dropped(self) -> int:
        """Documents that were left out because they are blank or too short, so far."""
        return sum(source.dropped for source in self.sources.values())

    def __len__(self) -> int:
        """TypeError: the sources end at different times, so a mixture has no epoch of its own."""
        raise TypeError("a mixture of sources has no epoch: give max_steps")

    def state_dict(self) -> dict[str, Any]:
        """The cursor: of the order, and of each source."""
        return {
            "counted": self._counted,
            "taken_of": dict(self._taken_of),
            "progress": self.progress,
            "online": self._online,
            "reached": self._reached,
            "order": self.order.state_dict(),
            "sources": {name: cursor_of(source) for name, source in self.sources.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken; ConfigError if it belongs to other sources."""
        if (saved := sorted(state["sources"])) != sorted(self.sources):
            raise ConfigError(
                f"the saved cursor belongs to the sources {', '.join(saved)}, not to "
                f"{', '.join(sorted(self.sources))}"
            )
        self._counted, self._taken_of = state["counted"], dict(state["taken_of"])
        self.progress, self._online = state["progress"], state.get("online")
        self._reached = state.get("reached", 0)
        self.order.load_state_dict(state["order"])
        for name, source in self.sources.items():
            source.load_state_dict(state["sources"][name])

    def next_turn(self) -> tuple[int, list[int]]:
        """(turn, numbers of its draws): a draw that counts, after those before it that are only read."""
        turn, draws = self._next_turn()
        return turn, [place for place, _, _ in draws]

    def _next_turn(self) -> tuple[int, list[tuple[int, str, int]]]:
        """As `next_turn`, with (number of the draw, source, number of the document in its source) of each."""
        draws: list[tuple[int, str, int]] = []
        while not draws or draws[-1][1] in self.read_only:
            draws.append((self.order.position, *self.order.next_draw()))
        self._counted += 1
        return self._counted - 1, draws

    def _next_own_draws(self) -> list[tuple[int, str, int]]:
        """The draws of this rank's next turn."""
        while True:
            turn, draws = self._next_turn()
            if turn % self.world_size == self.rank:
                return draws

    def _take_of(self, name: str, numbers: list[int]) -> list[Document]:
        """The documents of a source that have these numbers in its order."""
        source, documents = self.sources[name], []
        for _, run in groupby(enumerate(numbers), lambda item: item[1] - item[0]):  # consecutive numbers
            wanted = [number for _, number in run]
            skip(source, wanted[0] - self._taken_of[name])
            documents += take_documents(source, len(wanted), self.progress or 0.0)
            self._taken_of[name] = wanted[-1] + 1
        return documents

    def _limit_of(self, name: str) -> int | None:
        """The draws after which a source is exhausted; None if it never is."""
        settings: SourceConfig = self.config.sources[name]
        if settings.exhausted == "repeat":
            return None
        length = count_documents(self.sources[name])
        if length is None:
            raise ConfigError(
                f"data.sources.{name}: 'exhausted: {settings.exhausted}' needs the number of its documents, "
                "which a stream does not know; set streaming: false, or exhausted: repeat"
            )
        return math.ceil((settings.passes or 1) * length)

    def _passes_of(self, name: str) -> str:
        passes = self.config.sources[name].passes or 1
        return f"{passes:g} pass{'es' * (passes != 1)}"


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Errors say which source they are about."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"data.sources.{name}: {error}") from error


def seed_of(name: str, seed: int) -> int:
    """The seed of a source, from its name and the run's seed."""
    if name == UNNAMED:
        return seed
    return int(np.random.SeedSequence([seed, zlib.crc32(name.encode())]).generate_state(1)[0])


def skip(source: Any, n: int) -> None:
    """Pass over the next `n` documents of a source; one without a method `skip` reads them."""
    if n:
        getattr(source, "skip", source.take)(n)


def mean_length(source: Any, reopen: Callable[[], DocumentSource]) -> float:
    """Mean tokens of a source's documents: its own `mean_length`, or that of its first documents."""
    if (known := getattr(source, "mean_length", None)) is not None:
        return known
    documents = take_documents(reopen(), SAMPLE, 0.0)
    return sum(len(document.token_ids) for document in documents) / len(documents)
