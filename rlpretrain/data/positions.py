"""Where to think: the indices of a document before which a thought may be inserted.

An index i names the first target token: the model sees tokens 0..i-1, may think, and predicts `target_length`
tokens from i on. Text is only used to find positions; the model gets the document's own ids.
"""

from __future__ import annotations

import difflib
import importlib
import math
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
from torch import Tensor

from rlpretrain.config import ConfigError
from rlpretrain.data.token_starts import TextWithStarts
from rlpretrain.types import Document

KINDS = ("random", "every_k", "entropy", "before", "after", "sentence", "answer")
SENTENCE_END = re.compile(r"[.!?。！？][\"'”’)\]]*\s+(?=\S)|\n+\s*(?=\S)|[。！？]+(?=\S)")
PositionFunction = Callable[[Document, np.random.Generator], Sequence[int]]


class PositionPicker:
    """Chooses at most `per_document` positions of a document (None: all), by one of these kinds:

    - `random`: any, uniformly.
    - `every_k`: `min_context`, `min_context` + every, ...
    - `entropy`: where the model is least sure without a thought: among the `top_fraction` of candidates with
      the highest entropy, and at least `per_document` of them; 0 takes exactly the top ones.
    - `before`: the target starts with the text `marker`; `after`: it starts right behind it. Markers are
      whole words where they begin or end with a letter or digit ("is" is not found in "this"); white space at
      their ends does not matter. If a marker starts inside a token, that token starts the target. If it ends
      inside a token, the next token does.
    - `sentence`: the target starts a sentence or a line.
    - `answer`: the target starts the answer to a prompt (`data.answer_column`), and may end with the document
      before it has `target_length` tokens.
    - a function `(document, rng) -> indices`, itself or as "package.module:function".

    Every chosen i has min_context <= i and, except for `answer`, i + target_length <= len(document); a
    document without such an index gives an empty list. A special token (end of text, unknown) is never the
    first target, except where `before` or a function asks for it. If there are more indices than wanted, the
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
        counts = {"target_length": target_length, "min_context": min_context, "every": every}
        for name, value in counts.items():
            if value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        if per_document is not None and per_document < 1:
            raise ConfigError(
                f"positions per document must be at least 1 (or none for all), got {per_document}"
            )
        if not 0 <= top_fraction <= 1:
            raise ConfigError(f"top_fraction must lie between 0 and 1, got {top_fraction}")
        self.function = _load_function(kind)
        self.kind = kind if isinstance(kind, str) and self.function is None else "function"
        self.per_document, self.target_length, self.min_context = per_document, target_length, min_context
        self.every, self.top_fraction = every, top_fraction
        self.special = frozenset(tokenizer.all_special_ids)
        self.text = TextWithStarts(tokenizer)
        self.marker = self._marker_pattern(marker, tokenizer) if self.kind in ("before", "after") else None

    def __call__(
        self, document: Document, rng: np.random.Generator, entropies: Sequence[float] | Tensor | None = None
    ) -> list[int]:
        """Sorted, distinct indices.

        `entropies[i]` (nats) is that of the model's prediction of token i from those before it; an index
        whose entropy is NaN is not chosen. ValueError if entropies are needed and missing, or their number is
        not that of the tokens.
        """
        last = len(document.token_ids) - (1 if self.kind == "answer" else self.target_length)
        candidates = set(self._candidates(document, rng))
        indices = sorted(i for i in candidates if self.min_context <= i <= last)
        if self.kind not in ("before", "function"):
            indices = [i for i in indices if document.token_ids[i] not in self.special]
        if self.kind == "entropy":
            indices = self._highest_entropy(document, indices, entropies)
        if self.per_document is None or len(indices) <= self.per_document:
            return indices
        return sorted(int(i) for i in rng.choice(indices, size=self.per_document, replace=False))

    def _candidates(self, document: Document, rng: np.random.Generator) -> Sequence[int]:
        ids = document.token_ids
        if self.kind in ("random", "entropy"):
            return range(self.min_context, len(ids))
        if self.kind == "every_k":
            return range(self.min_context, len(ids), self.every)
        if self.function is not None:
            return _checked(document, self.function(document, rng))
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

    def _highest_entropy(
        self, document: Document, indices: list[int], entropies: Sequence[float] | Tensor | None
    ) -> list[int]:
        if entropies is None:
            raise ValueError("positions 'entropy' need the entropies of the document's tokens")
        values = np.asarray(entropies, dtype=np.float64)
        if values.shape != (len(document.token_ids),):
            raise ValueError(
                f"document {document.id} has {len(document.token_ids)} tokens, its entropies have shape "
                f"{values.shape}"
            )
        by_entropy = sorted((i for i in indices if not math.isnan(values[i])), key=lambda i: -values[i])
        wanted = math.ceil(self.top_fraction * len(by_entropy))
        if self.per_document is not None:
            wanted = max(wanted, self.per_document)
        return sorted(by_entropy[:wanted])

    def _marker_pattern(self, marker: str | None, tokenizer: Any) -> re.Pattern[str]:
        """What finds the marker in decoded text."""
        if not marker or marker.isspace():
            raise ConfigError(f"positions '{self.kind}' need a marker: the text to look for")
        ids = tokenizer(marker.strip(), add_special_tokens=False)["input_ids"]
        if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
            raise ConfigError(
                f"the tokenizer cannot write the marker '{marker}': part of it is unknown to it"
            )
        # As the tokenizer writes it, for instance in lower case.
        written = tokenizer.decode(ids, clean_up_tokenization_spaces=False).strip()
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


def _checked(document: Document, indices: Sequence[int]) -> list[int]:
    """The indices that a position function gave; ValueError for one that the document does not have."""
    size = len(document.token_ids)
    for i in indices:
        if isinstance(i, bool) or not isinstance(i, (int, np.integer)) or not 0 <= i < size:
            raise ValueError(
                f"the position function gave {i!r}, which is no index of document {document.id} "
                f"({document.source}) of {size} tokens"
            )
    return [int(i) for i in indices]


def _load_function(kind: str | PositionFunction) -> PositionFunction | None:
    """The function that `kind` is or names; None for a built-in kind."""
    if not isinstance(kind, str):
        return kind
    if kind in KINDS:
        return None
    module, colon, name = kind.partition(":")
    if not colon:
        near = difflib.get_close_matches(kind, KINDS, n=1)
        hint = f"there are {', '.join(KINDS)}, or package.module:function"
        if near:
            hint = f"did you mean '{near[0]}'?"
        raise ConfigError(f"no positions '{kind}': {hint}")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"positions '{kind}' cannot be imported: {error}") from error
    if not callable(function):
        raise ConfigError(
            f"positions '{kind}' is a {type(function).__name__}, not a function (document, rng) -> indices"
        )
    return cast(PositionFunction, function)  # its signature is known when it is called
