"""Reads documents from rows that come one after the other, in chunks that are tokenised together."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from datasets import IterableDataset
from datasets.distributed import split_dataset_by_node

from rlpretrain.data.opening import readable
from rlpretrain.data.tokenization import DocumentSplitter
from rlpretrain.types import Document

CHUNK = 64
"""Rows that are tokenised together; a cursor inside a chunk reads it again."""


class StreamedReader:
    """Documents of iterable rows.

    The cursor is the state of `datasets` before the present chunk, and the number of documents taken from it.
    """

    size: dict[str, int] = {}

    def __init__(self, rows: IterableDataset, splitter: DocumentSplitter, rank: int, world_size: int):
        self.rows, self.splitter, self.rank, self.world_size = rows, splitter, rank, world_size
        self.epoch = 0
        self.longest = splitter.data.max_length
        self._begin_pass(None, read=0, found=0, dropped=0)

    def __len__(self) -> int:
        raise TypeError(
            "a stream of documents has no known length; set data.streaming to false, or give max_steps"
        )

    def take(self, n: int) -> list[Document]:
        documents = list(islice(self.one_pass(), n))
        while len(documents) < n:
            self.epoch += 1
            self._begin_pass(None, read=0, found=0, dropped=self.dropped)
            documents += islice(self.one_pass(), n - len(documents))
        return documents

    def skip(self, n: int) -> None:
        self.take(n)

    def one_pass(self) -> Iterator[Document]:
        """What is left of the current pass."""
        while self.place < len(self.chunk) or self._read_chunk():
            self.place += 1
            yield self.chunk[self.place - 1]
        if not self.found:
            raise self.splitter.nothing_left(self.dropped)

    def cursor(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "place": self.place, **self.before_chunk}

    def seek(self, cursor: dict[str, Any]) -> None:
        self.epoch = cursor["epoch"]
        self._begin_pass(
            cursor["state"], read=cursor["read"], found=cursor["found"], dropped=cursor["dropped"]
        )
        if cursor["place"]:
            self._read_chunk()
            self.place = cursor["place"]

    def _begin_pass(self, state: Any, *, read: int, found: int, dropped: int) -> None:
        """Stand before this rank's row number `read`, in a pass that has given `found` documents."""
        # Each pass has a fresh object: a used one would begin again at the state that it once loaded.
        self.pass_rows = split_dataset_by_node(
            self.rows, rank=self.rank, world_size=self.world_size, strategy="examples"
        )
        if state is not None and not self.splitter.cells:
            self.pass_rows.load_state_dict(state)
        self.rows_left = iter(self.pass_rows)
        if self.splitter.cells and read:  # rows of local files are counted, also in older checkpoints
            with readable(self.splitter.data):
                next(islice(self.rows_left, read, read), None)
        self.before_chunk = {"state": state, "read": read, "found": found, "dropped": dropped}
        self.read, self.found, self.dropped, self.place = read, found, dropped, 0
        self.chunk: list[Document] = []

    def _read_chunk(self) -> bool:
        """Read the next chunk that has documents; False at the end of the pass."""
        self.chunk, self.place = [], 0
        while not self.chunk:
            self._note_cursor()
            with readable(self.splitter.data):
                values = list(islice(self.rows_left, CHUNK))
            if not values:
                return False
            self.chunk = self._make_documents(values)
            self.read += len(values)
            self.found += len(self.chunk)
        return True

    def _note_cursor(self) -> None:
        """Note where the next chunk begins."""
        state = self.before_chunk["state"]
        if self.read != self.before_chunk["read"] and not self.splitter.cells:
            state = self.pass_rows.state_dict()
        self.before_chunk = {"state": state, "read": self.read, "found": self.found, "dropped": self.dropped}

    def _make_documents(self, values: list[dict[str, Any]]) -> list[Document]:
        """The documents of the next rows; pieces that are too short are counted in `dropped`."""
        splitter = self.splitter
        rows = [(self.read + k) * self.world_size + self.rank for k in range(len(values))]
        columns = {name: [value[name] for value in values] for name in splitter.columns}
        documents = []
        for value, row, pieces in zip(values, rows, splitter.split(columns, rows), strict=True):
            for number, piece in enumerate(pieces):
                if len(piece.token_ids) < splitter.min_length:
                    self.dropped += 1
                    continue
                number_in_row = number if len(pieces) > 1 else None
                documents.append(splitter.make_document(piece, row, number_in_row, value))
        return documents
