"""The positions of held-out documents, and how they are divided into parts that are evaluated one by one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from rlpretrain.config import ConfigError
from rlpretrain.objectives import Objective
from rlpretrain.rollouts.drawing import DrawnPosition, document_number
from rlpretrain.types import Document


def choose_places(
    objective: Objective,
    documents: Sequence[Document],
    entropies: Sequence[Any],
    *,
    most: int = 1,
    seed: int = 0,
) -> list[DrawnPosition]:
    """The first `most` of the objective's positions in each document, with the seeds of their thoughts.

    They depend only on `seed` and the document's id. Raises ConfigError if no document has a position.
    """
    places = []
    for document, of_document in zip(documents, entropies, strict=True):
        rng = np.random.default_rng((seed, document_number(document.id)))
        for position in objective.positions(document, rng, of_document)[:most]:
            places.append(DrawnPosition(document, position, int(rng.integers(2**62)), None))
    if not places:
        raise ConfigError(
            f"none of the {len(documents)} held-out documents has a position for this objective"
        )
    return places


def in_parts(places: Sequence[DrawnPosition], size: int) -> Iterator[list[int]]:
    """The indices of `places` in parts of about `size`; the positions of a document stay together."""
    part: list[int] = []
    for i, place in enumerate(places):
        if len(part) >= size and place.document.id != places[i - 1].document.id:
            yield part
            part = []
        part.append(i)
    yield part
