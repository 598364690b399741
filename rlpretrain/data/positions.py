"""Where to think: the indices of a document before which a thought may be inserted.

An index i names the first target token: the model sees tokens 0..i-1, may think, and predicts `target_length`
tokens from i on. Text is only used to find places; what goes to the model are the document's own ids.
"""

from __future__ import annotations

import difflib
import importlib
import math
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from rlpretrain.config import ConfigError
from rlpretrain.data.token_text import TokenReader
from rlpretrain.types import Document

KINDS = ("random", "every_k", "entropy", "before", "after", "sentence", "answer")
SENTENCE_END = re.compile(r"[.!?。！？][\"'”’)\]]*\s+(?=\S)|\n+\s*(?=\S)|[。！？]+(?=\S)")
NO_CHARACTER = re.compile("[\udc80-\udcff]")
CACHED_PIECES = 500_000
MOST_BYTES = 4
"""Tokens that one character may be spread over."""
PositionFunction = Callable[[Document, np.random.Generator], Sequence[int]]


class PositionPicker:
    """Chooses at most `per_document` positions of a document (None: all it finds), by one of these kinds:

    - `random`: any, uniformly.
    - `every_k`: `min_context`, `min_context` + every, ...
    - `entropy`: where the model is least sure without a thought: among the `top_fraction` of candidates with
      the highest entropy, and at least `per_document` of them; 0 takes exactly the top ones.
    - `before`: the target starts with the text `marker`; `after`: it starts right behind it. Markers are
      whole words where they begin or end with a letter or digit ("is" is not found in "this"); white space at
      their ends does not matter. A marker that starts inside a token: that token starts the target. One that
      ends inside: the next does.
    - `sentence`: the target starts a sentence or a line.
    - `answer`: the target starts the answer to a prompt (`data.answer_column`), and may end with the document
      before it has `target_length` tokens.
    - a function `(document, rng) -> indices`, itself or as "package.module:function".

    Every chosen i has min_context <= i and, but for `answer`, i + target_length <= len(document); a document
    without such a place gives an empty list. A special token (end of text, unknown) is never the first
    target, except where `before` or a function asks for it. Where more places are found than wanted, the
    generator chooses among them uniformly: the same generator state and document give the same positions.

    Raises ConfigError (a ValueError) for settings that cannot work.
    """

    def __init__(
        self,
        kind: str | PositionFunction,
        tokenizer: Any,
        *,
        per_document: int | None = 1,
        target_length: int = 1,
        min_context: int = 1,
        marker: str | None = None,
        every: int = 16,
        top_fraction: float = 0.1,
    ):
        for name, value in {
            "target_length": target_length,
            "min_context": min_context,
            "every": every,
        }.items():
            if value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        if per_document is not None and per_document < 1:
            raise ConfigError(
                f"positions per document must be at least 1 (or none for all), got {per_document}"
            )
        if not 0 <= top_fraction <= 1:
            raise ConfigError(f"top_fraction must lie between 0 and 1, got {top_fraction}")
        self.function = _function(kind)
        self.kind = kind if isinstance(kind, str) and self.function is None else "function"
        self.per_document, self.target_length, self.min_context = per_document, target_length, min_context
        self.every, self.top_fraction = every, top_fraction
        self.special = frozenset(tokenizer.all_special_ids)
        self.text = TokenText(tokenizer)
        self.marker = self._marker(marker, tokenizer) if self.kind in ("before", "after") else None

    def __call__(
        self, document: Document, rng: np.random.Generator, entropies: Sequence[float] | Tensor | None = None
    ) -> list[int]:
        """Sorted, distinct indices.

        `entropies[i]` (nats) is that of the model's prediction of token i from those before it; where it is
        NaN, nothing is chosen. ValueError if they are needed and missing, or not one a token.
        """
        last = len(document.token_ids) - (1 if self.kind == "answer" else self.target_length)
        found = sorted({i for i in self._candidates(document, rng) if self.min_context <= i <= last})
        if self.kind not in ("before", "function"):
            found = [i for i in found if document.token_ids[i] not in self.special]
        if self.kind == "entropy":
            found = self._least_sure(document, found, entropies)
        if self.per_document is None or len(found) <= self.per_document:
            return found
        return sorted(int(i) for i in rng.choice(found, size=self.per_document, replace=False))

    def _candidates(self, document: Document, rng: np.random.Generator) -> Sequence[int]:
        ids = document.token_ids
        if self.kind in ("random", "entropy"):
            return range(self.min_context, len(ids))
        if self.kind == "every_k":
            return range(self.min_context, len(ids), self.every)
        if self.function is not None:
            return self._checked(document, self.function(document, rng))
        if self.kind == "answer":
            if document.answer_at is None:
                raise ConfigError(
                    f"positions 'answer': {document.source} has no answer; set data.answer_column"
                )
            return [document.answer_at]
        text, starts = self.text(ids)
        if self.marker is None:
            return [bisect_right(starts, match.end()) - 1 for match in SENTENCE_END.finditer(text)]
        if self.kind == "before":
            return [bisect_right(starts, match.start()) - 1 for match in self.marker.finditer(text)]
        return [bisect_left(starts, match.end()) for match in self.marker.finditer(text)]

    def _least_sure(
        self, document: Document, found: list[int], entropies: Sequence[float] | Tensor | None
    ) -> list[int]:
        if entropies is None:
            raise ValueError("positions 'entropy' need the entropies of the document's tokens")
        values = np.asarray(entropies, dtype=np.float64)
        if values.shape != (len(document.token_ids),):
            raise ValueError(
                f"document {document.id} has {len(document.token_ids)} tokens, its entropies have shape "
                f"{values.shape}"
            )
        found = sorted((i for i in found if not math.isnan(values[i])), key=lambda i: -values[i])
        if self.per_document is None:
            wanted = math.ceil(self.top_fraction * len(found))
        else:
            wanted = max(math.ceil(self.top_fraction * len(found)), self.per_document)
        return sorted(found[:wanted])

    def _checked(self, document: Document, indices: Sequence[int]) -> list[int]:
        for i in indices:
            if (
                isinstance(i, bool)
                or not isinstance(i, (int, np.integer))
                or not 0 <= i < len(document.token_ids)
            ):
                where = f"document {document.id} ({document.source}) of {len(document.token_ids)} tokens"
                raise ValueError(f"the position function gave {i!r}, which is no index of {where}")
        return [int(i) for i in indices]

    def _marker(self, marker: str | None, tokenizer: Any) -> re.Pattern[str]:
        if not marker or marker.isspace():
            raise ConfigError(f"positions '{self.kind}' need a marker: the text to look for")
        ids = tokenizer(marker.strip(), add_special_tokens=False)["input_ids"]
        if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
            raise ConfigError(
                f"the tokenizer cannot write the marker '{marker}': part of it is unknown to it"
            )
        written = tokenizer.decode(
            ids, clean_up_tokenization_spaces=False
        ).strip()  # lower-cased, if it does that
        # Words and signs that touch may stand apart in decoded text: a word-level tokenizer joins its tokens
        # by spaces.
        pattern, end = "", 0
        for part in re.finditer(r"\w+|[^\w\s]", written):
            if end:
                pattern += r"\s+" if part.start() > end else r"\s*"
            pattern += re.escape(part.group())
            end = part.end()
        head = r"(?<!\w)" if re.match(r"\w", written) else ""
        tail = r"(?!\w)" if re.search(r"\w$", written) else ""
        return re.compile(head + pattern + tail)


class TokenText:
    """The text of token ids, and for each token where in it its first visible character stands.

    Where the vocabulary is made of bytes, text comes from the tokens' bytes. Elsewhere tokens are decoded
    beside their neighbour, since alone they may lose a space; pieces are kept for next time. A token that is
    only some bytes of a character is held to start at that character, if it is the first of them, or right
    behind it.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.reader = TokenReader(tokenizer)
        self.pieces: dict[tuple[int, ...], str] = {}

    def __call__(self, ids: Sequence[int]) -> tuple[str, list[int]]:
        return self._from_bytes(ids) if self.reader.exact else self._from_pieces(ids)

    def _from_bytes(self, ids: Sequence[int]) -> tuple[str, list[int]]:
        parts = self.reader.raw(ids)
        text = b"".join(parts).decode("utf-8", "surrogateescape")  # one character for a byte that is none
        begins, at = [], 0  # the byte with which each character begins
        for character in text:
            begins.append(at)
            at += 1 if "\udc80" <= character <= "\udcff" else len(character.encode())
        starts, end, last = [], 0, 0
        for part in parts:
            first, end = last, end + len(part)
            last = bisect_left(begins, end)
            piece = text[first:last]
            starts.append(first + len(piece) - len(piece.lstrip()))
        return NO_CHARACTER.sub("\N{REPLACEMENT CHARACTER}", text), starts

    def _from_pieces(self, ids: Sequence[int]) -> tuple[str, list[int]]:
        parts: list[str] = []
        starts: list[int] = []
        size, before, read = (
            0,
            0,
            0,
        )  # characters so far; ids[before:read] is the neighbour, ids[read:] is open
        for end in range(1, len(ids) + 1):
            old, new = self._decode(ids[before:read]), self._decode(ids[before:end])
            if new.endswith("\N{REPLACEMENT CHARACTER}") and end < len(ids) and end - read < MOST_BYTES:
                continue  # not a whole character yet
            piece = new[len(old) :]
            starts.append(size + len(piece) - len(piece.lstrip()))
            size += len(piece)
            starts += [size] * (end - read - 1)
            parts.append(piece)
            before, read = read, end
        return "".join(parts), starts

    def _decode(self, ids: Sequence[int]) -> str:
        key = tuple(ids)
        if key not in self.pieces:
            if len(self.pieces) >= CACHED_PIECES:
                self.pieces.clear()
            self.pieces[key] = (
                self.tokenizer.decode(list(key), clean_up_tokenization_spaces=False) if key else ""
            )
        return self.pieces[key]


def _function(kind: str | PositionFunction) -> PositionFunction | None:
    """The function that `kind` is or names; None for a kind of our own."""
    if callable(kind):
        return kind
    if kind in KINDS:
        return None
    module, colon, name = kind.partition(":")
    if not colon:
        near = difflib.get_close_matches(kind, KINDS, n=1)
        hint = (
            f"did you mean '{near[0]}'?"
            if near
            else f"there are {', '.join(KINDS)}, or package.module:function"
        )
        raise ConfigError(f"no positions '{kind}': {hint}")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"positions '{kind}' cannot be imported: {error}") from error
    if not callable(found):
        raise ConfigError(
            f"positions '{kind}' is a {type(found).__name__}, not a function (document, rng) -> indices"
        )
    return found
