"""The text of single tokens: which characters of a text each of its tokens gives.

A token that is decoded alone loses its leading space with some tokenizers, and becomes U+FFFD if it is part
of a character. So tokens are read in context, and bytes come from the vocabulary if it is made of bytes.
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
MOST_TOKENS = 4
"""Tokens that one character may be spread over: its bytes in UTF-8."""
CONTEXT = 8
"""Tokens before a text that decide how it begins."""


@dataclass(frozen=True, slots=True)
class TokenText:
    """What one token gives.

    `text` holds the characters that the token completes: the texts of all tokens, joined, are the whole text.
    `label` is never empty; it also shows bytes of a character that a later token completes, as in ⟨E6⟩.
    """

    text: str
    label: str

    @property
    def spelled(self) -> str:
        """The label with its white space visible."""
        return "".join(SPACES.get(c, c) for c in self.label)

    @property
    def inline(self) -> str:
        """The label inside running text: only a label of nothing but white space is spelled out.

        A line break stays one, behind its sign.
        """
        if self.label.strip(" \n\t\r"):
            return self.label
        return "".join(SPACES.get(c, c) + ("\n" if c == "\n" else "") for c in self.label)


class TokenReader:
    """Reads token ids one by one, with any tokenizer.

    There are three kinds: a byte-level vocabulary, one of sentencepiece with a token for each byte, and all
    others, whose tokens are decoded together with their neighbour.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        added = getattr(tokenizer, "added_tokens_decoder", None) or {}
        self.added = {token_id: str(token) for token_id, token in added.items()}
        self.byte_of: dict[str, int] | None = None  # of a byte-level vocabulary: characters → bytes
        self.has_byte_tokens = False
        if not hasattr(tokenizer, "convert_ids_to_tokens"):
            return
        if _is_byte_level(tokenizer):
            self.byte_of = _byte_level_alphabet()
        else:
            byte_ids = set(tokenizer.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in range(256)]))
            self.has_byte_tokens = len(byte_ids - {None, tokenizer.unk_token_id}) == 256

    @property
    def exact(self) -> bool:
        """Whether the vocabulary gives the bytes of its tokens."""
        return self.byte_of is not None or self.has_byte_tokens

    def __call__(self, ids: Sequence[int], after: Sequence[int] = ()) -> list[TokenText]:
        """What each of `ids` gives where it follows `after`."""
        context = [int(i) for i in after[-CONTEXT:]]
        whole = [*context, *(int(i) for i in ids)]
        if not self.exact:
            return self._decode_each(whole)[len(context) :]
        token_bytes = self._bytes_of_all(whole, at_start=not context)
        return self._assign_characters(whole, token_bytes)[len(context) :]

    def raw(self, ids: Sequence[int], after: Sequence[int] = ()) -> list[bytes]:
        """The bytes of each of `ids` where it follows `after`: exact if the vocabulary is made of bytes.

        Decoded text does not give them: incomplete characters become U+FFFD, and with byte fallback so do
        the complete ones beside them.
        """
        context = [int(i) for i in after[-CONTEXT:]]
        whole = [*context, *(int(i) for i in ids)]
        if self.exact:
            return self._bytes_of_all(whole, at_start=not context)[len(context) :]
        texts = self._decode_each(whole)[len(context) :]
        return [token.text.encode("utf-8", "surrogatepass") for token in texts]

    def text(self, ids: Sequence[int], after: Sequence[int] = ()) -> str:
        """The text of `ids` where they follow `after`."""
        return "".join(token.text for token in self(ids, after))

    def spelled(self, ids: Sequence[int], after: Sequence[int] = ()) -> str:
        """The text of `ids` with all white space and incomplete characters visible."""
        return "".join(token.spelled for token in self(ids, after))

    def _bytes_of_all(self, ids: Sequence[int], at_start: bool) -> list[bytes]:
        """The bytes of each token; `at_start` of a text, the tokenizer's own space before it is left out."""
        token_bytes = [self._bytes(i) for i in ids]
        has_space = at_start and self.has_byte_tokens and ids and token_bytes[0][:1] == b" "
        if has_space and not self._decode(ids[:1]).startswith(" "):
            token_bytes[0] = token_bytes[0][1:]
        return token_bytes

    def _bytes(self, token_id: int) -> bytes:
        if token_id in self.added:
            return self.added[token_id].encode("utf-8", "surrogatepass")
        token = self.tokenizer.convert_ids_to_tokens(token_id)
        if token is None:  # a row of the embedding table without a token
            return b""
        if self.byte_of is not None:
            if all(c in self.byte_of for c in token):
                return bytes(self.byte_of[c] for c in token)
            return token.encode("utf-8", "surrogatepass")
        byte = BYTE_TOKEN.fullmatch(token)
        return bytes([int(byte[1], 16)]) if byte else token.replace("▁", " ").encode("utf-8", "surrogatepass")

    def _assign_characters(self, ids: Sequence[int], token_bytes: Sequence[bytes]) -> list[TokenText]:
        """Give each character to the token whose bytes complete it."""
        owner = [k for k, part in enumerate(token_bytes) for _ in part]  # the token of each byte
        data = b"".join(token_bytes)
        texts, labels = [""] * len(token_bytes), [""] * len(token_bytes)
        at = 0
        while at < len(data):
            size = _character_size(data, at)
            end = at + max(size, 1)
            last = owner[end - 1]
            for byte in range(at, end):
                if not size or owner[byte] != last:
                    labels[owner[byte]] += f"⟨{data[byte]:02X}⟩"
            character = data[at:end].decode() if size else REPLACEMENT
            texts[last] += character
            labels[last] += character if size else ""
            at = end
        return [
            TokenText(text, label or self._name(i)) for i, text, label in zip(ids, texts, labels, strict=True)
        ]

    def _decode_each(self, ids: Sequence[int]) -> list[TokenText]:
        out: list[TokenText] = []
        neighbour, read = 0, 0  # ids[neighbour:read] is the neighbour of what follows
        for end in range(1, len(ids) + 1):
            before, after = self._decode(ids[neighbour:read]), self._decode(ids[neighbour:end])
            if after.endswith(REPLACEMENT) and end < len(ids) and end - read < MOST_TOKENS:
                out.append(TokenText("", self._name(ids[end - 1])))  # the character is incomplete
                continue
            text = after[len(before) :] if after.startswith(before) else self._decode(ids[read:end])
            out.append(TokenText(text, text or self._name(ids[end - 1])))
            neighbour, read = read, end
        return out

    def _name(self, token_id: int) -> str:
        """A token without characters, by its name in the vocabulary."""
        name = None
        if hasattr(self.tokenizer, "convert_ids_to_tokens"):
            name = self.tokenizer.convert_ids_to_tokens(token_id)
        return f"⟨{name or token_id}⟩"

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False) if ids else ""


def _character_size(data: bytes, at: int) -> int:
    """Bytes of the character that begins at `at`; 0 if none does."""
    for size in range(1, MOST_TOKENS + 1):
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
    """GPT-2's characters for bytes: printable ones are themselves, the others follow U+0100 in order."""
    printed = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    hidden = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(256 + k): byte for k, byte in enumerate(hidden)}
