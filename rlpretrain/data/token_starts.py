"""The text of token ids, and the character at which each token starts."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

from rlpretrain.data.token_text import MOST_TOKENS, REPLACEMENT, TokenReader

SINGLE_BYTE = re.compile("[\udc80-\udcff]")
"""A byte that belongs to no character, as `surrogateescape` writes it."""
MOST_CACHED = 500_000
"""Decoded texts of neighbouring tokens that are kept."""


class TextWithStarts:
    """The text of token ids, and for each token where in it its first visible character stands.

    If the vocabulary is made of bytes, the text comes from the tokens' bytes. Otherwise tokens are decoded
    together with their neighbour, since a token alone may lose its space. A token that holds only some bytes
    of a character starts at that character if its bytes are the first, otherwise right behind it.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.reader = TokenReader(tokenizer)
        self.decoded: dict[tuple[int, ...], str] = {}

    def __call__(self, ids: Sequence[int]) -> tuple[str, list[int]]:
        return self._from_bytes(ids) if self.reader.exact else self._from_decoding(ids)

    def _from_bytes(self, ids: Sequence[int]) -> tuple[str, list[int]]:
        token_bytes = self.reader.raw(ids)
        text = b"".join(token_bytes).decode("utf-8", "surrogateescape")
        character_starts, size = [], 0  # in bytes
        for character in text:
            character_starts.append(size)
            size += 1 if SINGLE_BYTE.match(character) else len(character.encode())
        starts, end, next_character = [], 0, 0
        for part in token_bytes:
            first, end = next_character, end + len(part)
            next_character = bisect_left(character_starts, end)
            starts.append(first + _leading_space(text[first:next_character]))
        return SINGLE_BYTE.sub(REPLACEMENT, text), starts

    def _from_decoding(self, ids: Sequence[int]) -> tuple[str, list[int]]:
        parts: list[str] = []
        starts: list[int] = []
        size = 0  # characters so far
        neighbour, read = 0, 0  # ids[neighbour:read] is the neighbour of what follows
        for end in range(1, len(ids) + 1):
            before, after = self._decode(ids[neighbour:read]), self._decode(ids[neighbour:end])
            if after.endswith(REPLACEMENT) and end < len(ids) and end - read < MOST_TOKENS:
                continue  # the character is incomplete
            part = after[len(before) :]
            starts.append(size + _leading_space(part))
            size += len(part)
            starts += [size] * (end - read - 1)
            parts.append(part)
            neighbour, read = read, end
        return "".join(parts), starts

    def _decode(self, ids: Sequence[int]) -> str:
        key = tuple(ids)
        if not key:
            return ""
        if key not in self.decoded:
            if len(self.decoded) >= MOST_CACHED:
                self.decoded.clear()
            self.decoded[key] = self.tokenizer.decode(list(key), clean_up_tokenization_spaces=False)
        return self.decoded[key]


def _leading_space(text: str) -> int:
    """Characters of white space at the beginning."""
    return len(text) - len(text.lstrip())
