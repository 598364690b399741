"""Places of thoughts in the text of a row: from token indices to characters of the source, and back.

The source text is kept character by character. So a place is a character of it, found by the tokenizer's
offsets, and not by decoding.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rlpretrain.config import ConfigError, DataConfig
from rlpretrain.data.tokenization import DocumentSplitter
from rlpretrain.types import Document

Span = tuple[int, int]
"""The characters of a token: first, and behind the last."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A document of a row, and where its tokens stand in the row's text."""

    document: Document
    text: str
    """The text of the whole row."""
    spans: tuple[Span, ...] | None
    """Of each token; None where the tokens of prompt and answer are not those of their joined text."""
    first: int
    """The character of the row's text at which the piece begins."""
    last: int
    """The character behind its end."""
    answer: int | None
    """The character at which the answer begins."""

    def cut(self, index: int) -> int | None:
        """The character at which a thought before token `index` is inserted.

        None inside a character or a word: its halves would be other tokens than those of the document.
        """
        if index == self.document.answer_at and self.spans is None:
            return self.answer
        if self.spans is None:
            return None
        place = self.spans[index - 1][1]
        if index < len(self.spans) and place > self.spans[index][0]:
            return None
        return None if is_inside_word(self.text, place) else place

    def end(self) -> int:
        """The character behind the piece, or behind the word that its end cuts in two."""
        place = self.last
        while is_inside_word(self.text, place):
            place += 1
        return place


@dataclass(frozen=True, slots=True)
class RowText:
    """A row of the data: its text, and the documents that its text gives."""

    row: int
    text: str
    pieces: tuple[Piece, ...]
    """Empty for a row that is blank, too short, or too long for prompt and answer."""
    columns: Mapping[str, Any]
    """Columns that are kept beside the text."""


class RowReader:
    """Reads rows of `data` as texts with documents, by the library's own rules of splitting.

    Raises ConfigError for a tokenizer without offsets.
    """

    def __init__(self, data: DataConfig, tokenizer: Any, min_length: int, cells: bool):
        if not getattr(tokenizer, "is_fast", False):
            raise ConfigError(
                "augment needs a tokenizer that says which characters its tokens are (a fast one of "
                f"transformers); this {type(tokenizer).__name__} does not"
            )
        self.data, self.tokenizer, self.min_length, self.cells = data, tokenizer, min_length, cells
        self.splitter = DocumentSplitter(data, tokenizer, min_length, cells)

    def __call__(self, columns: Mapping[str, Sequence[Any]], rows: range) -> Iterator[RowText]:
        """The rows with these numbers; `columns` has their values."""
        pieces = self.splitter.split(columns, rows)
        for k, (row, of_row) in enumerate(zip(rows, pieces, strict=True)):
            values = {name: column[k] for name, column in columns.items()}
            read = {name: json.loads(value) if self.cells else value for name, value in values.items()}
            text, answer = self._text(read)
            numbers = [None] if len(of_row) == 1 else list(range(len(of_row)))
            documents = [
                self.splitter.make_document(piece, row, number, values)
                for piece, number in zip(of_row, numbers, strict=True)
            ]
            found = self._place(documents, text, answer) if documents[0].token_ids else []
            if found and self.data.long == "truncate" and self.data.answer_column is None:
                text = text[: found[-1].end()]
            usable = tuple(piece for piece in found if len(piece.document.token_ids) >= self.min_length)
            kept = {name: read[name] for name in self.data.meta_columns}
            yield RowText(row, text, usable, kept)

    def _text(self, values: Mapping[str, Any]) -> tuple[str, int | None]:
        """The row's text, and the character at which its answer begins."""
        text = values[self.data.column] or ""
        if self.data.answer_column is None:
            return text, None
        answer = values[self.data.answer_column] or ""
        if not answer:
            return text, None
        prompt = text + self.data.answer_join
        return prompt + answer, len(prompt)

    def _place(self, documents: Sequence[Document], text: str, answer: int | None) -> list[Piece]:
        """The pieces of a row with their characters."""
        encoded = self.tokenizer(text, return_offsets_mapping=True, verbose=False)
        ids, spans = list(encoded["input_ids"]), [tuple(span) for span in encoded["offset_mapping"]]
        lead, tail = len(self.splitter.lead), len(self.splitter.tail)
        if tail:
            ids, spans = ids[:-tail], spans[:-tail]
        pieces, at = [], 0
        for number, document in enumerate(documents):
            skipped = lead if number else 0
            body = list(document.token_ids[skipped:])
            if tail and number == len(documents) - 1 and tuple(body[-tail:]) == tuple(self.splitter.tail):
                body = body[:-tail]
                document = _without_end(document, tail)
            own = spans[at : at + len(body)]
            first = spans[at - 1][1] if at else 0
            if ids[at : at + len(body)] != body:
                pieces.append(Piece(document, text, None, first, len(text), answer))
                continue
            at += len(body)
            whole = number == len(documents) - 1 and at == len(ids)
            last = len(text) if whole else own[-1][1]
            of_tokens = ((first, first),) * skipped + tuple((start, end) for start, end in own)
            pieces.append(Piece(document, text, of_tokens, first, last, answer))
        return pieces


def is_inside_word(text: str, place: int) -> bool:
    """Whether letters (of a script with cases) or digits stand on both sides of a place."""
    return 0 < place < len(text) and _is_of_word(text[place - 1]) and _is_of_word(text[place])


def _is_of_word(character: str) -> bool:
    return character.isdigit() or character.lower() != character.upper()


def _without_end(document: Document, tokens: int) -> Document:
    """A document without the special tokens that the tokenizer puts behind every text."""
    return replace(document, token_ids=document.token_ids[:-tokens])
