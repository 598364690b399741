"""Sampled answers by a column of the documents, such as the difficulty."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rlpretrain.experiments.tasks import Answers

Parts = Mapping[str, Mapping[str, Mapping[str, Sequence[float | None]]]]
"""{value of the column: {model or difference: {number: [mean, low, high]}}}."""


def split_by_part(
    measured: Mapping[str, Sequence[Answers]], values: Sequence[str]
) -> dict[str, dict[str, list[Answers]]]:
    """The answers to the examples with each of the `values`, which stand in the order of the examples.

    Parts come in natural order: A2 before A10.
    """
    parts = {}
    for part in sorted(set(values), key=_natural):
        kept = [value == part for value in values]
        parts[part] = {
            name: [_where(answers, kept) for answers in of_seeds] for name, of_seeds in measured.items()
        }
    return parts


def numbers_shown(parts: Parts) -> list[str]:
    """The numbers of the tables and the plot: after a thought those that a verifier judged, else pass@k."""
    numbers = list(next(iter(next(iter(parts.values())).values())))
    for kind, way in (("verified@", "thinking"), ("pass@", "thinking"), ("pass@", "direct")):
        if found := [number for number in numbers if number.startswith(kind) and number.endswith(way)]:
            return found
    return numbers


def _where(answers: Answers, kept: Sequence[bool]) -> dict[str, Any]:
    """The answers to some of the examples."""
    return {
        number: {"examples": [value for value, wanted in zip(found["examples"], kept, strict=True) if wanted]}
        for number, found in answers.items()
    }


def _natural(text: str) -> list[tuple[int, str]]:
    """A key by which numbers inside texts sort as numbers.

    >>> sorted(["A10", "B1", "A2"], key=_natural)
    ['A2', 'A10', 'B1']
    """
    return [(int(piece) if piece.isdecimal() else -1, piece) for piece in re.split(r"(\d+)", text)]
