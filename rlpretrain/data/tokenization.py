"""Splits the texts of rows into documents of token ids, and finds where their answers begin."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlpretrain.config import ConfigError, DataConfig
from rlpretrain.data.fingerprints import fingerprint
from rlpretrain.data.scores import SEGMENT_STARTS, read_segments, segment_of_tokens, starts_of
from rlpretrain.data.token_text import TokenReader
from rlpretrain.types import Document

SPLIT_VERSION = 2
"""Version of the rules by which texts become documents: a new one invalidates cached tokens."""
CONTINUED = ("\n", "a", ".", "1")
"""Characters after which an answer is tokenised as a continuation."""


@dataclass(frozen=True, slots=True)
class TokenPiece:
    """The token ids of one document, and the index of its answer's first token (None: no answer).

    With `data.score_column`, `scores` has a number for each token, and `segment_starts` the index of the
    first token of each segment.
    """

    token_ids: list[int]
    answer_at: int | None = None
    scores: list[float] | None = None
    segment_starts: list[int] | None = None


def special_tokens_around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer puts before and after every text."""
    bare, framed = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    for at in range(len(framed) - len(bare) + 1):
        if framed[at : at + len(bare)] == bare:
            return framed[:at], framed[at + len(bare) :]
    bos = tokenizer.bos_token_id
    return ([bos] if bos is not None and framed[:1] == [bos] else []), []


class DocumentSplitter:
    """Turns the texts of rows into token ids, splits them, and makes Documents, as `data` asks."""

    def __init__(self, data: DataConfig, tokenizer: Any, min_length: int, cells: bool = False):
        self.data, self.tokenizer, self.min_length = data, tokenizer, min_length
        self.cells = cells  # values are JSON: see rows.py
        self.eos = tokenizer.eos_token_id if data.append_eos else None
        self.lead, self.tail = special_tokens_around(tokenizer)
        if data.max_length <= len(self.lead):
            raise ConfigError(
                f"data.max_length is {data.max_length}: the tokenizer begins every text with "
                f"{len(self.lead)} special tokens"
            )
        self.reader = TokenReader(tokenizer)
        whole_file = os.path.isfile(os.path.expanduser(data.path)) and "[" not in data.split
        self.row_is_line = whole_file and data.path.endswith(".txt")
        others = (data.answer_column, data.score_column)
        self.columns = (data.column, *(name for name in others if name))
        if data.score_column and not getattr(tokenizer, "is_fast", False):
            raise ConfigError(
                "data.score_column needs a fast tokenizer: a slow one does not tell the characters of a token"
            )
        self.fingerprint = fingerprint(tokenizer)

    def split(self, columns: Mapping[str, Sequence[Any]], rows: Sequence[int]) -> list[list[TokenPiece]]:
        """The pieces of each row, at least one; a blank or missing text gives one empty piece."""
        data = self.data
        if self.cells:
            columns = {name: [json.loads(cell) for cell in columns[name]] for name in self.columns}
        if data.score_column is not None:
            return self._split_scored(columns, rows)
        if data.answer_column is None:
            texts = self._tokenize(columns, data.column, rows)
            return [[TokenPiece(ids) for ids, _ in self._split_ids(text_ids)] for text_ids in texts]
        prompt_ids = self._tokenize(columns, data.column, rows, suffix=data.answer_join)
        answer_ids = self._tokenize(columns, data.answer_column, rows, add_special_tokens=False)
        prompts = [f"{prompt}{data.answer_join}" for prompt in columns[data.column]]
        answers = columns[data.answer_column]
        per_row = zip(prompts, answers, prompt_ids, answer_ids, strict=True)
        return [[self._prompt_and_answer(*row)] for row in per_row]

    def source(self, row: int) -> str:
        """`file:line` in a text file, where a row is a line; else `data[row]`."""
        return f"{self.data.path}:{row + 1}" if self.row_is_line else f"{self.data.path}[{row}]"

    def make_document(
        self, piece: TokenPiece, row: int, number: int | None, values: Mapping[str, Any]
    ) -> Document:
        """The document of a piece, the `number`-th of its row (None: the only one) with columns `values`."""
        meta = {
            name: json.loads(values[name]) if self.cells else values[name] for name in self.data.meta_columns
        }
        if piece.segment_starts is not None:
            meta[SEGMENT_STARTS] = piece.segment_starts
        document_id = str(row) if number is None else f"{row}.{number}"
        scores = None if piece.scores is None else tuple(piece.scores)
        ids = tuple(piece.token_ids)
        return Document(document_id, ids, self.source(row), meta or None, piece.answer_at, scores)

    def nothing_left(self, dropped: int) -> ConfigError:
        """The error for data in which no document is long enough."""
        other = ", or longer than data.max_length with their answer" if self.data.answer_column else ""
        reason = f"no document has {self.min_length} tokens; {dropped} are blank or shorter{other}"
        return ConfigError(f"{self.data.path}: {reason if dropped else 'fewer rows than ranks'}")

    def _tokenize(
        self,
        columns: Mapping[str, Sequence[Any]],
        name: str,
        rows: Sequence[int],
        suffix: str = "",
        **options: Any,
    ) -> list[list[int]]:
        """The ids of each text of a column with `suffix` behind it; empty for a blank or missing text."""
        texts = columns[name]
        for text, row in zip(texts, rows, strict=True):
            if text is not None and not isinstance(text, str):
                raise ConfigError(
                    f"{self.source(row)}: column '{name}' holds {type(text).__name__}, not text"
                )
        blank = [not text or text.isspace() for text in texts]
        written = [text + suffix for text, empty in zip(texts, blank, strict=True) if not empty]
        encoded = []
        if written:
            encoded = self.tokenizer(written, return_attention_mask=False, verbose=False, **options)[
                "input_ids"
            ]
        ids = iter(encoded)
        return [[] if empty else next(ids) for empty in blank]

    def _split_ids(self, ids: list[int]) -> list[tuple[list[int], list[int]]]:
        """A text's ids in parts of at most `max_length`; the last holds more than the text's end tokens.

        Beside each part: for each of its tokens, the index in `ids` of the text's token that it is or, for a
        special token that is added, next to which it stands.
        """
        if not ids:
            return [([], [])]
        ends_with_tail = bool(self.tail) and ids[-len(self.tail) :] == self.tail
        text_end = len(ids) - len(self.tail) if ends_with_tail else len(ids)
        places = list(range(len(ids)))
        if self.eos is not None and ids[-1:] != [self.eos]:
            ids, places = [*ids, self.eos], [*places, len(places) - 1]
        most, step = self.data.max_length, self.data.max_length - len(self.lead)
        starts = range(most, text_end, step) if self.data.long == "split" else ()
        later = [
            (self.lead + ids[start : start + step], [start] * len(self.lead) + places[start : start + step])
            for start in starts
        ]
        return [(ids[:most], places[:most]), *later]

    def _split_scored(
        self, columns: Mapping[str, Sequence[Any]], rows: Sequence[int]
    ) -> list[list[TokenPiece]]:
        """The pieces of each row, with the scores of their tokens."""
        name = self.data.score_column
        assert name is not None
        out = []
        texts = self._tokenize(columns, self.data.column, rows)
        for text, ids, value, row in zip(columns[self.data.column], texts, columns[name], rows, strict=True):
            if not ids:
                out.append([TokenPiece([], None, [], [])])
                continue
            try:
                segments = read_segments(value, text)
            except ValueError as error:
                raise ConfigError(f"{self.source(row)}: column '{name}': {error}") from None
            offsets = self.tokenizer(text, return_offsets_mapping=True, verbose=False)["offset_mapping"]
            of_token = segment_of_tokens(text, offsets, segments)
            pieces = []
            for part, places in self._split_ids(ids):
                own = [of_token[place] for place in places]
                scores = [segments[k].score for k in own]
                pieces.append(TokenPiece(part, None, scores, starts_of(own)))
            out.append(pieces)
        return out

    def _prompt_and_answer(
        self, prompt: str, answer: str, prompt_ids: list[int], answer_ids: list[int]
    ) -> TokenPiece:
        """Prompt and answer; empty where one is blank, or both are longer than `max_length`."""
        if not prompt_ids or not answer_ids:
            return TokenPiece([])
        prompt_ids = prompt_ids[: len(prompt_ids) - len(self.tail)]
        joined = self._join(prompt, answer, prompt_ids, answer_ids)
        ids = joined.token_ids
        if self.eos is not None and ids[-1:] != [self.eos]:
            ids = [*ids, self.eos]
        return TokenPiece(ids, joined.answer_at) if len(ids) <= self.data.max_length else TokenPiece([])

    def _join(self, prompt: str, answer: str, prompt_ids: list[int], answer_ids: list[int]) -> TokenPiece:
        """Ids whose text is `prompt` followed by `answer`, and the index of the answer's first id.

        A tokenizer may begin every text with a space of its own, or mark a word that continues another: then
        the answer's own ids give another text after a prompt. The first of these with the text of both is
        taken: the ids of both texts together, if they begin with the prompt's; the prompt's ids and the
        answer's own; the prompt's ids and those that the answer has after another character. If none has, the
        ids of both together, with the answer at the first that differs from the prompt's.
        """
        together = self.tokenizer(prompt + answer, verbose=False)["input_ids"]
        together = together[: len(together) - len(self.tail)]
        if together[: len(prompt_ids)] == prompt_ids and len(together) > len(prompt_ids):
            return TokenPiece(together, len(prompt_ids))
        unknown = self.tokenizer.unk_token_id
        if unknown is not None and together.count(unknown) > (prompt_ids + answer_ids).count(unknown):
            # two known words whose compound is unknown
            return TokenPiece(prompt_ids + answer_ids, len(prompt_ids))
        text = self.reader.text(together)
        characters = dict.fromkeys((prompt[-1:], *CONTINUED))
        candidates = (answer_ids, *(self._answer_ids_after(c, answer) for c in characters))
        for ids in candidates:
            if ids and self.reader.text(prompt_ids + ids) == text:
                return TokenPiece(prompt_ids + ids, len(prompt_ids))
        pairs = zip(prompt_ids, together, strict=False)
        first_difference = next((k for k, (a, b) in enumerate(pairs) if a != b), len(together) - 1)
        return TokenPiece(together, min(first_difference, len(together) - 1))

    def _answer_ids_after(self, character: str, answer: str) -> list[int]:
        """The answer's ids after a character; empty where they merge with it."""
        before = self.tokenizer(character, add_special_tokens=False)["input_ids"]
        both = self.tokenizer(character + answer, add_special_tokens=False)["input_ids"]
        return both[len(before) :] if before and both[: len(before)] == before else []
