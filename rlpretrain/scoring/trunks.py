"""The documents of a step whose next-token loss is taken: each draw counts once."""

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
    """Indices of the tokens before which groups of the step think."""

    def __len__(self) -> int:
        return len(self.document.token_ids)


@dataclass(slots=True)
class Trunks:
    """The documents of a step that are not yet in a micro-batch with their next-token loss."""

    left: Counter[str]
    """Document id → the number of its draws."""
    places: Mapping[str, list[int]]
    """Document id → indices of the tokens before which groups of the step think."""

    @classmethod
    def of(cls, batch: Batch) -> Trunks:
        """All documents of a batch."""
        places: dict[str, list[int]] = defaultdict(list)
        for group in batch.groups:
            places[group.position.document_id].append(group.position.index)
        return cls(Counter(d.id for d in batch.documents), places)

    def take(self, document: Document) -> list[frozenset[int]]:
        """Remove a document; for each of its draws, the tokens before which groups think.

        Empty if the document was taken before. No sum over draws depends on which draw a group belongs to, so
        a place goes to the first draw that does not have it.
        """
        draws: list[set[int]] = [set() for _ in range(self.left.pop(document.id, 0))]
        for place in self.places.get(document.id, ()):
            first_without = next((draw for draw in draws if place not in draw), set())
            first_without.add(place)
        return [frozenset(draw) for draw in draws]
