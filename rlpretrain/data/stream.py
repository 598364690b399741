"""Text in any form `datasets` reads becomes token documents: cut once, shared out over ranks, with an exact
cursor.

The rows of the data are numbered 0, 1, 2, ... in file order. A row becomes one document with the id "<row>"
or, where it is longer than `max_length` and `long: split`, several: "<row>.0", "<row>.1", ... Ids are the
same in every run, on every rank.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, Features, IterableDataset, List, Value
from datasets.distributed import split_dataset_by_node
from datasets.fingerprint import Hasher

from rlpretrain.config import ConfigError, DataConfig
from rlpretrain.data.sources import open_rows, quiet, readable, reads_cells
from rlpretrain.data.tokenization import CUT_VERSION, Cutter, older_fingerprint
from rlpretrain.types import Document

CHUNK = 64
"""Rows of a stream that are tokenised together; a cursor inside a chunk reads it again."""


class DocumentStream:
    """Endless documents of one rank, in a seeded order, resumable at any document.

    Map-style data is tokenised once, cached by `datasets`, and every epoch is a new permutation of all
    documents (their own order with `shuffle: false`). The epochs make one global sequence that does not
    depend on `world_size`; rank r takes its elements r, r + world_size, ... So one rank that takes 2n
    documents and two ranks that take n each see the same ones, over epoch ends too. With `streaming: true`
    rows come in file order and rank r reads rows r, r + world_size, ... of each pass: the union is the
    one-rank order where every row gives one document and the ranks have equally many rows.

    The tokenizer's BOS, if it adds one, heads every piece of a split document. The end-of-text token stands
    where the text ends: not between pieces, not after a truncated document.

    Raises ConfigError for data that cannot be read (`sources.open_rows`) and if no document has `min_length`
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
            rows, cutter = open_rows(data), Cutter(data, tokenizer, min_length, reads_cells(data))
            if isinstance(rows, IterableDataset):
                self._reader: _Indexed | _Streamed = _Streamed(rows, cutter, rank, world_size)
            else:
                self._reader = _Indexed(rows, cutter, rank, world_size, seed)
        fields = {f"data.{k}": list(v) if isinstance(v, tuple) else v for k, v in asdict(data).items()}
        where = {"seed": seed, "rank": rank, "world_size": world_size, "min_length": min_length}
        self._identity = {
            **fields,
            **where,
            "tokenizer": older_fingerprint(tokenizer),
            "tokenizer_ids": cutter.fingerprint,
        }
        self._identity |= self._reader.size

    def take(self, n: int) -> list[Document]:
        """The next `n` documents of this rank, over as many epochs as that needs."""
        with quiet():
            return self._reader.take(n)

    @property
    def epoch(self) -> int:
        """Passes over the data behind us. A stream notices the end of a pass when it reads beyond it."""
        return self._reader.epoch

    @property
    def dropped(self) -> int:
        """Documents and tail pieces left out as blank or too short; of a stream, those met so far."""
        return self._reader.dropped

    @property
    def longest(self) -> int:
        """Tokens of the longest document; of a stream, whose documents are not known yet, `max_length`."""
        return self._reader.longest

    def __len__(self) -> int:
        """Documents of one epoch over all ranks; TypeError for a stream, whose length is unknown."""
        return len(self._reader)

    def state_dict(self) -> dict[str, Any]:
        """The cursor and what it belongs to, as plain values. Every rank keeps its own."""
        return {"identity": dict(self._identity), "cursor": self._reader.cursor()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken; ConfigError if it belongs to other data, seed, rank or number
        of ranks.
        """
        saved, here = state["identity"], self._identity
        keys = [
            key for key in saved if saved[key] != here.get(key)
        ]  # a field of a later version is in `here` only
        if keys:
            changes = "; ".join(f"{key} was {saved.get(key)!r}, is {here.get(key)!r}" for key in keys)
            raise ConfigError(f"the saved place in the documents is not one in these: {changes}")
        self._reader.seek(state["cursor"])


def read_all(
    data: DataConfig, tokenizer: Any, *, limit: int | None = None, min_length: int = 2
) -> list[Document]:
    """One pass in file order, at most `limit` documents: evaluation sets. Errors are those of
    DocumentStream.
    """
    stream = DocumentStream(replace(data, shuffle=False), tokenizer, min_length=min_length)
    with quiet():
        return list(islice(stream._reader.one_pass(), limit))


def versions() -> list[str]:
    """Of the libraries that make ids of texts."""
    return [version(name) for name in ("tokenizers", "transformers")]


class _Indexed:
    """Map-style rows: everything is tokenised first; the cursor is one number."""

    def __init__(self, rows: Dataset, cutter: Cutter, rank: int, world_size: int, seed: int):
        self.cutter, self.rank, self.world_size, self.seed = cutter, rank, world_size, seed
        data, home = cutter.data, Path(datasets.config.HF_DATASETS_CACHE).expanduser()
        how = [
            CUT_VERSION,
            cutter.cells,
            cutter.eos,
            cutter.lead,
            cutter.tail,
            *versions(),
            data.column,
            data.answer_column,
            data.answer_join,
            data.max_length,
            data.long,
        ]
        files = [
            (f["filename"], os.stat(f["filename"]).st_size, os.stat(f["filename"]).st_mtime_ns)
            for f in rows.cache_files
        ]
        mark = Hasher.hash([rows._fingerprint, files, cutter.fingerprint, how])
        file = None
        if rows.cache_files and not Path(rows.cache_files[0]["filename"]).is_relative_to(home):
            file = (
                home / "rlpretrain" / f"{mark}.arrow"
            )  # else it would be written into the user's own folder
            file.parent.mkdir(parents=True, exist_ok=True)
        self.tokens = rows.map(
            self._tokenise,
            with_indices=True,
            batched=True,
            remove_columns=rows.column_names,
            features=Features(
                token_ids=List(Value("int32")),
                answer_at=Value("int32"),
                row=Value("int64"),
                piece=Value("int32"),
            ),
            new_fingerprint=mark,
            cache_file_name=str(file) if file else None,
        )
        self.meta = rows.select_columns(list(data.meta_columns)) if data.meta_columns else None
        lengths = pc.list_value_length(self.tokens.data.column("token_ids")).to_numpy()
        self.kept = np.flatnonzero(lengths >= cutter.min_length)
        self.dropped, self.taken = len(lengths) - len(self.kept), 0
        if not len(self.kept):
            raise cutter.all_short(self.dropped)
        self.size = {"documents": len(self.kept), "tokens": int(lengths[self.kept].sum())}
        self.longest = int(lengths[self.kept].max())
        self._order: tuple[int, np.ndarray] = (-1, self.kept)

    def _tokenise(self, batch: dict[str, list], rows: list[int]) -> dict[str, list]:
        out: dict[str, list] = {"token_ids": [], "answer_at": [], "row": [], "piece": []}
        for row, cut in zip(rows, self.cutter.pieces(batch, rows), strict=True):
            out["token_ids"] += [ids for ids, _ in cut]
            out["answer_at"] += [at for _, at in cut]
            out["row"] += [row] * len(cut)
            out["piece"] += range(len(cut)) if len(cut) > 1 else [-1]
        return out

    def __len__(self) -> int:
        return len(self.kept)

    @property
    def epoch(self) -> int:
        return (self.taken * self.world_size + self.rank) // len(self.kept)

    def _at(self, i: int) -> int:
        """Element i of the global sequence of all epochs."""
        epoch, place = divmod(i, len(self.kept))
        if epoch != self._order[0]:
            shuffle = self.cutter.data.shuffle
            order = np.random.default_rng([self.seed, epoch]).permutation(self.kept) if shuffle else self.kept
            self._order = (epoch, order)
        return int(self._order[1][place])

    def take(self, n: int) -> list[Document]:
        places = [self._at((self.taken + k) * self.world_size + self.rank) for k in range(n)]
        if not places:
            return []
        self.taken += n
        found = self.tokens[places]
        meta = self.meta[found["row"]] if self.meta is not None else {}
        columns = (found[name] for name in ("row", "piece", "token_ids", "answer_at"))
        return [
            self.cutter.document(row, piece, ids, at, {name: column[k] for name, column in meta.items()})
            for k, (row, piece, ids, at) in enumerate(zip(*columns, strict=True))
        ]

    def one_pass(self) -> Iterator[Document]:
        for start in range(0, len(self), 1000):
            yield from self.take(min(1000, len(self) - start))

    def cursor(self) -> dict[str, Any]:
        return {"taken": self.taken}

    def seek(self, cursor: dict[str, Any]) -> None:
        self.taken = cursor["taken"]


class _Streamed:
    """Rows read lazily, by chunks. The cursor is the library's own state before the chunk, and a place in
    the chunk.
    """

    size: dict[str, int] = {}

    def __init__(self, rows: IterableDataset, cutter: Cutter, rank: int, world_size: int):
        self.rows, self.cutter, self.rank, self.world_size, self.epoch = rows, cutter, rank, world_size, 0
        self.longest = cutter.data.max_length
        self._start(None, read=0, found=0, dropped=0)

    def __len__(self) -> int:
        raise TypeError(
            "a stream of documents has no known length; set data.streaming to false, or give max_steps"
        )

    def _start(self, state: Any, *, read: int, found: int, dropped: int) -> None:
        """Stand before this rank's row number `read`, in a pass that has given `found` documents."""
        # Each pass has a fresh object: a used one would begin again at the state that it once loaded.
        self.pass_ = split_dataset_by_node(
            self.rows, rank=self.rank, world_size=self.world_size, strategy="examples"
        )
        if state is not None and not self.cutter.cells:
            self.pass_.load_state_dict(state)
        self.left = iter(self.pass_)
        if self.cutter.cells and read:  # the rows of files are counted: checkpoints of before them too
            with readable(self.cutter.data):
                next(islice(self.left, read, read), None)
        self.before = {"state": state, "read": read, "found": found, "dropped": dropped}
        self.read, self.found, self.dropped, self.place = read, found, dropped, 0
        self.chunk: list[Document] = []

    def _fill(self) -> bool:
        """The next chunk that has documents; False at the end of the pass."""
        self.chunk, self.place = [], 0
        while not self.chunk:
            state = self.before["state"]
            if self.read != self.before["read"] and not self.cutter.cells:
                state = self.pass_.state_dict()
            self.before = {"state": state, "read": self.read, "found": self.found, "dropped": self.dropped}
            with readable(self.cutter.data):
                values = list(islice(self.left, CHUNK))
            if not values:
                return False
            rows = [(self.read + k) * self.world_size + self.rank for k in range(len(values))]
            cuts = self.cutter.pieces(
                {name: [value[name] for value in values] for name in self.cutter.columns}, rows
            )
            for value, row, cut in zip(values, rows, cuts, strict=True):
                whole = len(cut) == 1
                long = [(k, *piece) for k, piece in enumerate(cut) if len(piece[0]) >= self.cutter.min_length]
                self.chunk += [
                    self.cutter.document(row, -1 if whole else k, ids, at, value) for k, ids, at in long
                ]
                self.dropped += len(cut) - len(long)
            self.read += len(values)
            self.found += len(self.chunk)
        return True

    def one_pass(self) -> Iterator[Document]:
        """What is left of the current pass."""
        while self.place < len(self.chunk) or self._fill():
            self.place += 1
            yield self.chunk[self.place - 1]
        if not self.found:
            raise self.cutter.all_short(self.dropped)

    def take(self, n: int) -> list[Document]:
        documents = list(islice(self.one_pass(), n))
        while len(documents) < n:
            self.epoch += 1
            self._start(None, read=0, found=0, dropped=self.dropped)
            documents += islice(self.one_pass(), n - len(documents))
        return documents

    def cursor(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "place": self.place, **self.before}

    def seek(self, cursor: dict[str, Any]) -> None:
        self.epoch = cursor["epoch"]
        self._start(cursor["state"], **{k: cursor[k] for k in ("read", "found", "dropped")})
        if cursor["place"]:
            self._fill()
            self.place = cursor["place"]
