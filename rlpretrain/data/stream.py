"""Opens document sources. `DocumentStream` is the built-in one: text in any form that `datasets` reads.

The rows of the data are numbered 0, 1, 2, ... in file order. A row becomes one document with the id "<row>"
or, where it is longer than `max_length` and `long: split`, several: "<row>.0", "<row>.1", ... Ids are the
same in every run, on every rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import islice
from typing import Any

from datasets import IterableDataset

from rlpretrain.config import ConfigError, DataConfig
from rlpretrain.config.plugins import find
from rlpretrain.data.document_source import DocumentSource, SourceInputs, check_source, name_of
from rlpretrain.data.fingerprints import older_fingerprint
from rlpretrain.data.indexed import IndexedReader
from rlpretrain.data.mixture import Mixture
from rlpretrain.data.opening import open_rows, quiet, reads_cells
from rlpretrain.data.streamed import CHUNK, StreamedReader
from rlpretrain.data.tokenization import DocumentSplitter
from rlpretrain.types import Document

__all__ = ["CHUNK", "DocumentStream", "open_source", "read_all"]


class DocumentStream:
    """Endless documents of one rank from the texts of `data.path`, resumable at any document.

    Map-style data is tokenised once, cached by `datasets`, and every epoch is a new seeded permutation of all
    documents (their own order with `shuffle: false`). The epochs make one global sequence that does not
    depend on `world_size`; rank r takes its elements r, r + world_size, ... So one rank that takes 2n
    documents and two ranks that take n each see the same ones, over epoch ends too. With `streaming: true`
    rows come in file order and rank r reads rows r, r + world_size, ... of each pass: the union is the
    one-rank order if every row gives one document and the ranks have equally many rows.

    The tokenizer's BOS, if it adds one, heads every piece of a split document. The end-of-text token stands
    where the text ends: not between pieces, not after a truncated document.

    Raises ConfigError for data that cannot be read (`opening.open_rows`) and if no document has `min_length`
    tokens.
    """

    def __init__(
        self,
        data: DataConfig,
        tokenizer: Any,
        *,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        min_length: int = 2,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not one of {world_size} ranks")
        if data.max_length < max(min_length, 2):
            raise ConfigError(
                f"data.max_length is {data.max_length}; a document needs {max(min_length, 2)} tokens"
            )
        with quiet():
            rows = open_rows(data)
            splitter = DocumentSplitter(data, tokenizer, min_length, reads_cells(data))
            if isinstance(rows, IterableDataset):
                self._reader: IndexedReader | StreamedReader = StreamedReader(
                    rows, splitter, rank, world_size
                )
            else:
                self._reader = IndexedReader(rows, splitter, rank, world_size, seed)
        fields = {f"data.{k}": list(v) if isinstance(v, tuple) else v for k, v in asdict(data).items()}
        self._identity = {
            **fields,
            "seed": seed,
            "rank": rank,
            "world_size": world_size,
            "min_length": min_length,
            "tokenizer": older_fingerprint(tokenizer),
            "tokenizer_ids": splitter.fingerprint,
            **self._reader.size,
        }

    def take(self, n: int, progress: float = 0.0) -> list[Document]:
        """The next `n` documents of this rank, over as many epochs as that needs, whatever the progress."""
        with quiet():
            return self._reader.take(n)

    def skip(self, n: int) -> None:
        """Pass over the next `n` documents of this rank."""
        with quiet():
            self._reader.skip(n)

    def one_pass(self) -> Iterator[Document]:
        """The documents of one pass; of a stream, what is left of the present one."""
        return self._reader.one_pass()

    def sample(self, n: int, seed: int) -> list[Document]:
        """`n` random documents in the data's order; of a stream, whose length is unknown, the next `n`."""
        with quiet():
            if isinstance(self._reader, IndexedReader):
                return self._reader.sample(n, seed)
            return list(islice(self._reader.one_pass(), n))

    @property
    def epoch(self) -> int:
        """Complete passes over the data. A stream notices the end of a pass when it reads beyond it."""
        return self._reader.epoch

    @property
    def dropped(self) -> int:
        """Documents and tail pieces left out as blank or too short; of a stream, those met so far."""
        return self._reader.dropped

    @property
    def longest(self) -> int:
        """Tokens of the longest document; of a stream, whose documents are not known yet, `max_length`."""
        return self._reader.longest

    @property
    def mean_length(self) -> float | None:
        """Mean tokens of a document; None for a stream, whose documents are not known yet."""
        size = self._reader.size
        return size["tokens"] / size["documents"] if size else None

    def __len__(self) -> int:
        """Documents of one epoch over all ranks; TypeError for a stream, whose length is unknown."""
        return len(self._reader)

    def state_dict(self) -> dict[str, Any]:
        """The cursor and what it belongs to, as plain values. Every rank keeps its own."""
        return {"identity": dict(self._identity), "cursor": self._reader.cursor()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken; ConfigError if data, seed, rank or number of ranks differ."""
        saved, own = state["identity"], self._identity
        # A setting of a later version is in `own` only.
        changed = [key for key in saved if saved[key] != own.get(key)]
        if changed:
            changes = "; ".join(f"{key} was {saved.get(key)!r}, is {own.get(key)!r}" for key in changed)
            raise ConfigError(f"the saved cursor belongs to other documents: {changes}")
        self._reader.seek(state["cursor"])


def open_source(inputs: SourceInputs, section: str = "data") -> DocumentSource:
    """The document source that the section `data` or `ntp_data` names, at its first document.

    Raises ConfigError that names the source if it cannot be loaded or opened, or is not a document source.
    """
    data = inputs.config
    if data.sources:
        return Mixture(inputs, open_source, section)
    if data.source is None:
        return DocumentStream(
            data,
            inputs.tokenizer,
            rank=inputs.rank,
            world_size=inputs.world_size,
            seed=inputs.seed,
            min_length=inputs.min_length,
        )
    setting = f"{section}.source"
    factory: Any = find(data.source, setting)
    if not callable(factory):
        raise ConfigError(
            f"{setting}: '{data.source}' is a {type(factory).__name__}, not a class or function"
        )
    try:
        source: Any = factory(inputs)
    except ConfigError as error:
        raise ConfigError(f"{setting} '{data.source}': {error}") from error
    except (ValueError, LookupError, OSError) as error:
        raise ConfigError(f"{setting} '{data.source}': {type(error).__name__}: {error}") from error
    check_source(source, data)
    return source


def read_all(
    data: DataConfig,
    tokenizer: Any,
    *,
    limit: int | None = None,
    seed: int | None = None,
    min_length: int = 2,
) -> list[Document]:
    """One pass in the data's own order, at most `limit` documents: evaluation sets.

    With a `seed` these are a random sample, without one the first; streams, and sources of others without a
    method `sample(n, seed)`, always give the first. Scores are not read: an evaluation uses none. Errors are
    those of `open_source`; a source without `one_pass` is refused too.
    """
    if data.sources:
        raise ConfigError("'sources' are mixed for training; held-out documents come from one path")
    plain = replace(data, shuffle=False, order_by=None, score_column=None)
    inputs = SourceInputs(config=plain, tokenizer=tokenizer, min_length=min_length)
    source = open_source(inputs)
    sample = getattr(source, "sample", None)
    if limit is not None and seed is not None and sample is not None:
        return sample(limit, seed)
    one_pass = getattr(source, "one_pass", None)
    if one_pass is None:
        raise ConfigError(
            f"{name_of(source)} has no one_pass(), so it cannot read the documents of an evaluation"
        )
    with quiet():
        return list(islice(one_pass(), limit))
