"""Reads documents from rows that can be indexed: everything is tokenised first, and cached by `datasets`."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, Features, List, Value
from datasets import config as datasets_config
from datasets.fingerprint import Hasher

from rlpretrain.config import ConfigError
from rlpretrain.data.fingerprints import library_versions
from rlpretrain.data.opening import bar_if, order_column
from rlpretrain.data.tokenization import SPLIT_VERSION, DocumentSplitter, TokenPiece
from rlpretrain.types import Document

NONE = -1
"""In the cached columns `answer_at` (no answer) and `piece` (the only piece of its row)."""
MANY_ROWS = 10_000
"""Rows from which on tokenizing shows a progress bar."""
FEATURES = Features(
    token_ids=List(Value("int32")), answer_at=Value("int32"), row=Value("int64"), piece=Value("int32")
)
"""The cached columns, one line a piece."""
SCORED = Features(**FEATURES, scores=List(Value("float64")), segment_starts=List(Value("int32")))
"""The cached columns with `data.score_column`."""


class IndexedReader:
    """Documents of map-style rows; the cursor is one number."""

    def __init__(self, rows: Dataset, splitter: DocumentSplitter, rank: int, world_size: int, seed: int):
        self.splitter, self.rank, self.world_size, self.seed = splitter, rank, world_size, seed
        data = splitter.data
        self.pieces = self._tokenize_rows(rows)
        self.meta = rows.select_columns(list(data.meta_columns)) if data.meta_columns else None
        lengths = pc.list_value_length(  # pyright: ignore[reportAttributeAccessIssue] (made at run time)
            self.pieces.data.column("token_ids")
        ).to_numpy()
        self.kept = np.flatnonzero(lengths >= splitter.min_length)  # pieces that are long enough
        self.dropped, self.taken = len(lengths) - len(self.kept), 0
        if not len(self.kept):
            raise splitter.nothing_left(self.dropped)
        self.size = {"documents": len(self.kept), "tokens": int(lengths[self.kept].sum())}
        self.longest = int(lengths[self.kept].max())
        self.ranking = self._read_ranking(rows) if data.order_by else None  # of each piece
        self._order: tuple[int, np.ndarray] = (-1, self.kept)  # an epoch, and its order of pieces

    def __len__(self) -> int:
        return len(self.kept)

    @property
    def epoch(self) -> int:
        return (self.taken * self.world_size + self.rank) // len(self.kept)

    def take(self, n: int) -> list[Document]:
        if not n:
            return []
        first = self.taken
        indices = [self._index_of((first + k) * self.world_size + self.rank) for k in range(n)]
        self.taken += n
        return self._documents(indices)

    def skip(self, n: int) -> None:
        self.taken += n

    def one_pass(self) -> Iterator[Document]:
        for start in range(0, len(self), 1000):
            yield from self.take(min(1000, len(self) - start))

    def sample(self, n: int, seed: int) -> list[Document]:
        """`n` documents drawn without replacement, in the order of the data; all if there are no more."""
        if n >= len(self.kept):
            return self._documents(self.kept.tolist())
        drawn = np.random.default_rng(seed).choice(self.kept, n, replace=False)
        return self._documents(sorted(drawn.tolist()))

    def _documents(self, indices: list[int]) -> list[Document]:
        """The documents of these pieces."""
        pieces = self.pieces[indices]
        meta = self.meta[pieces["row"]] if self.meta is not None else {}
        documents = []
        for k, row in enumerate(pieces["row"]):
            answer_at, number = pieces["answer_at"][k], pieces["piece"][k]
            scored = [pieces[name][k] for name in SCORED if name not in FEATURES and name in pieces]
            piece = TokenPiece(pieces["token_ids"][k], None if answer_at == NONE else answer_at, *scored)
            values = {name: column[k] for name, column in meta.items()}
            documents.append(
                self.splitter.make_document(piece, row, None if number == NONE else number, values)
            )
        return documents

    def cursor(self) -> dict[str, Any]:
        return {"taken": self.taken}

    def seek(self, cursor: dict[str, Any]) -> None:
        self.taken = cursor["taken"]

    def _tokenize_rows(self, rows: Dataset) -> Dataset:
        """The pieces of all rows, from the cache where they are in it."""
        mark = self._cache_key(rows)
        home = Path(datasets_config.HF_DATASETS_CACHE).expanduser()
        file = None
        if rows.cache_files and not Path(rows.cache_files[0]["filename"]).is_relative_to(home):
            # By default `datasets` would write into the user's own folder.
            file = home / "rlpretrain" / f"{mark}.arrow"
            file.parent.mkdir(parents=True, exist_ok=True)
        with bar_if(len(rows) >= MANY_ROWS):
            return rows.map(
                self._split_rows,
                with_indices=True,
                batched=True,
                remove_columns=rows.column_names,
                features=SCORED if self.splitter.data.score_column else FEATURES,
                new_fingerprint=mark,
                cache_file_name=str(file) if file else None,
                desc="tokenizing",
            )

    def _cache_key(self, rows: Dataset) -> str:
        """A hash of everything that decides the pieces: files, tokenizer, settings, versions."""
        splitter, data = self.splitter, self.splitter.data
        settings = [
            SPLIT_VERSION,
            splitter.cells,
            splitter.eos,
            splitter.lead,
            splitter.tail,
            *library_versions(),
            data.column,
            data.answer_column,
            data.answer_join,
            data.max_length,
            data.long,
            *([data.score_column] if data.score_column else []),
        ]
        names = [file["filename"] for file in rows.cache_files]
        files = [(name, os.stat(name).st_size, os.stat(name).st_mtime_ns) for name in names]
        return Hasher.hash([rows._fingerprint, files, splitter.fingerprint, settings])

    def _read_ranking(self, rows: Dataset) -> np.ndarray:
        """The number of each piece by which pieces are ordered; ConfigError for what is not a number."""
        name = order_column(self.splitter.data)
        numbers = np.empty(len(rows))
        for row, cell in enumerate(rows[name]):
            value = json.loads(cell) if self.splitter.cells else cell
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ConfigError(
                    f"{self.splitter.source(row)}: column '{name}' of order_by holds {value!r}, not a number"
                )
            numbers[row] = value
        of_pieces = numbers[np.asarray(self.pieces["row"])]
        return -of_pieces if str(self.splitter.data.order_by).startswith("-") else of_pieces

    def _split_rows(self, batch: dict[str, list], rows: list[int]) -> dict[str, list]:
        out: dict[str, list] = {"token_ids": [], "answer_at": [], "row": [], "piece": []}
        for row, pieces in zip(rows, self.splitter.split(batch, rows), strict=True):
            out["token_ids"] += [piece.token_ids for piece in pieces]
            out["answer_at"] += [NONE if piece.answer_at is None else piece.answer_at for piece in pieces]
            out["row"] += [row] * len(pieces)
            out["piece"] += range(len(pieces)) if len(pieces) > 1 else [NONE]
            if self.splitter.data.score_column:
                out.setdefault("scores", []).extend(piece.scores for piece in pieces)
                out.setdefault("segment_starts", []).extend(piece.segment_starts for piece in pieces)
        return out

    def _index_of(self, i: int) -> int:
        """The index in `pieces` of element i of the global sequence of all epochs."""
        epoch, place = divmod(i, len(self.kept))
        if epoch != self._order[0]:
            shuffle = self.splitter.data.shuffle
            order = np.random.default_rng([self.seed, epoch]).permutation(self.kept) if shuffle else self.kept
            if self.ranking is not None:
                order = order[np.argsort(self.ranking[order], kind="stable")]
            self._order = (epoch, order)
        return int(self._order[1][place])
