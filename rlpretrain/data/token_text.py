"""The text of single tokens: which characters each one gives, so that what is said of a token stands at its
characters.

Decoding a token alone loses its leading space with some tokenizers and gives U+FFFD where it is a part of a
character. So tokens are read in their place, and bytes come from the vocabulary where it is made of bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
SPACES = {" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍"}
BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
MOST_BYTES = 4
"""Tokens that one character may be spread over."""
NEAR = 8
"""Tokens before a text that decide how it begins."""


@dataclass(frozen=True, slots=True)
class TokenText:
    """What one token gives.

    `text` holds the characters that the token finishes: the texts of all tokens, joined, are the whole text.
    `label` is never empty; it also shows bytes of a character that a later token finishes, as in ⟨E6⟩.
    """

    text: str
    label: str

    @property
    def spelled(self) -> str:
        """The label with its white space visible."""
        return "".join(SPACES.get(c, c) for c in self.label)

    @property
    def inline(self) -> str:
        """The label inside running text: white space is visible where there is nothing else, and lines
        break as they did.
        """
        if self.label.strip(" \n\t\r"):
            return self.label
        return "".join(SPACES.get(c, c) + ("\n" if c == "\n" else "") for c in self.label)


class TokenReader:
    """Reads token ids one by one, with any tokenizer.

    There are three kinds: a byte-level vocabulary, one of sentencepiece with a token for each byte, and all
    others, whose tokens are decoded beside their neighbour.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.added = {
            i: str(token) for i, token in (getattr(tokenizer, "added_tokens_decoder", None) or {}).items()
        }
        self.byte_of: dict[str, int] | None = None
        self.pieces = False
        if not hasattr(tokenizer, "convert_ids_to_tokens"):
            return
        if _is_byte_level(tokenizer):
            self.byte_of = _byte_level_alphabet()
        else:
            known = set(tokenizer.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in range(256)]))
            self.pieces = len(known - {None, tokenizer.unk_token_id}) == 256

    @property
    def exact(self) -> bool:
        """Whether the vocabulary says the bytes of its tokens."""
        return self.byte_of is not None or self.pieces

    def __call__(self, ids: Sequence[int], after: Sequence[int] = ()) -> list[TokenText]:
        """What each of `ids` gives where it follows `after`."""
        near = [int(i) for i in after[-NEAR:]]
        whole = [*near, *(int(i) for i in ids)]
        if not self.exact:
            return self._decoded(whole)[len(near) :]
        return self._spread(whole, self._raw(whole, first=not near))[len(near) :]

    def raw(self, ids: Sequence[int], after: Sequence[int] = ()) -> list[bytes]:
        """The bytes of each of `ids` where it follows `after`: exact where the vocabulary is made of bytes.

        A text that was decoded cannot say them: characters that are not whole became U+FFFD, with byte
        fallback the whole ones beside them too.
        """
        near = [int(i) for i in after[-NEAR:]]
        whole = [*near, *(int(i) for i in ids)]
        if self.exact:
            return self._raw(whole, first=not near)[len(near) :]
        return [token.text.encode("utf-8", "surrogatepass") for token in self._decoded(whole)][len(near) :]

    def text(self, ids: Sequence[int], after: Sequence[int] = ()) -> str:
        """The text of `ids` where they follow `after`."""
        return "".join(token.text for token in self(ids, after))

    def spelled(self, ids: Sequence[int], after: Sequence[int] = ()) -> str:
        """The text of `ids` with all white space and unfinished characters visible."""
        return "".join(token.spelled for token in self(ids, after))

    def _raw(self, ids: Sequence[int], first: bool) -> list[bytes]:
        found = [self._bytes(i) for i in ids]
        prefixed = first and self.pieces and ids and found[0][:1] == b" "
        if prefixed and not self._decode(ids[:1]).startswith(" "):
            found[0] = found[0][1:]  # the dummy prefix
        return found

    def _bytes(self, token_id: int) -> bytes:
        if token_id in self.added:
            return self.added[token_id].encode("utf-8", "surrogatepass")
        token = self.tokenizer.convert_ids_to_tokens(token_id)
        if token is None:  # a row of the table without a token
            return b""
        if self.byte_of is not None:
            if all(c in self.byte_of for c in token):
                return bytes(self.byte_of[c] for c in token)
            return token.encode("utf-8", "surrogatepass")
        byte = BYTE_TOKEN.fullmatch(token)
        return bytes([int(byte[1], 16)]) if byte else token.replace("▁", " ").encode("utf-8", "surrogatepass")

    def _spread(self, ids: Sequence[int], found: Sequence[bytes]) -> list[TokenText]:
        """Characters to the tokens whose bytes finish them."""
        owner = [k for k, part in enumerate(found) for _ in part]
        data, texts, labels, at = b"".join(found), [""] * len(found), [""] * len(found), 0
        while at < len(data):
            size = _character(data, at)
            last = owner[at + max(size, 1) - 1]
            for byte in range(at, at + max(size, 1)):
                if not size or owner[byte] != last:
                    labels[owner[byte]] += f"⟨{data[byte]:02X}⟩"
            character = data[at : at + size].decode() if size else REPLACEMENT
            texts[last] += character
            labels[last] += character if size else ""
            at += max(size, 1)
        return [
            TokenText(text, label or self._named(i))
            for i, text, label in zip(ids, texts, labels, strict=True)
        ]

    def _decoded(self, ids: Sequence[int]) -> list[TokenText]:
        out: list[TokenText] = []
        before, read = 0, 0  # ids[before:read] is the neighbour, ids[read:end] is open
        for end in range(1, len(ids) + 1):
            old, new = self._decode(ids[before:read]), self._decode(ids[before:end])
            if new.endswith(REPLACEMENT) and end < len(ids) and end - read < MOST_BYTES:
                out.append(TokenText("", self._named(ids[end - 1])))  # not a whole character yet
                continue
            text = new[len(old) :] if new.startswith(old) else self._decode(ids[read:end])
            out.append(TokenText(text, text or self._named(ids[end - 1])))
            before, read = read, end
        return out

    def _named(self, token_id: int) -> str:
        """A token that gives no character, by its name in the vocabulary."""
        name = (
            self.tokenizer.convert_ids_to_tokens(token_id)
            if hasattr(self.tokenizer, "convert_ids_to_tokens")
            else None
        )
        return f"⟨{name or token_id}⟩"

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False) if ids else ""


def _character(data: bytes, at: int) -> int:
    """Bytes of the character that begins at `at`; 0 where none does."""
    for size in range(1, MOST_BYTES + 1):
        try:
            data[at : at + size].decode()
        except UnicodeDecodeError:
            continue
        return size if at + size <= len(data) else 0
    return 0


def _is_byte_level(tokenizer: Any) -> bool:
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    if decoder is None:
        return hasattr(tokenizer, "byte_decoder")
    state = json.loads(decoder.__getstate__())
    return "ByteLevel" in {step.get("type") for step in (state, *state.get("decoders", ()))}


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's characters for bytes: those that can be printed are themselves, the others follow U+0100 in
    their order.
    """
    printed = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    hidden = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(256 + k): byte for k, byte in enumerate(hidden)}
