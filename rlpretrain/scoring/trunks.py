"""The documents of a step whose next-token loss is taken: each draw once, and what it leaves to the
thoughts.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from rlpretrain.types import Batch, Document


@dataclass(frozen=True, slots=True)
class Trunk:
    """A row whose next-token loss is taken in a micro-batch."""

    row: int
    document: Document
    asked: frozenset[int]

    def __len__(self) -> int:
        return len(self.document.token_ids)


@dataclass(slots=True)
class Trunks:
    """The documents of a step whose next-token loss is still to be laid, and the tokens before which its
    groups think.
    """

    left: Counter[str]  # document id → how often it was drawn
    places: Mapping[str, list[int]]

    @classmethod
    def of(cls, batch: Batch) -> Trunks:
        """All documents of a batch."""
        places: dict[str, list[int]] = defaultdict(list)
        for group in batch.groups:
            places[group.position.document_id].append(group.position.index)
        return cls(Counter(d.id for d in batch.documents), places)

    def take(self, document: Document) -> list[frozenset[int]]:
        """For each time that the document was drawn, the tokens thought about then. Empty when its loss is
        laid already.

        Which draw a group belongs to makes no difference to any sum over them: a place goes to the first that
        lacks it.
        """
        draws: list[set[int]] = [set() for _ in range(self.left.pop(document.id, 0))]
        for place in self.places.get(document.id, ()):
            free = next((draw for draw in draws if place not in draw), set())
            free.add(place)
        return [frozenset(draw) for draw in draws]
