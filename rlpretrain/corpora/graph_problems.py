"""Problems of the graphs corpus: named quantities, each defined by a digit or by an operation on others.

A problem is a directed acyclic graph and a query. Its op is the number of operations that the query needs.
All values are modulo 10. The idea is that of "Interplay" (arXiv 2512.07783); this generator is our own. It
grows the graph backward from the query, so op is exact without rejection, and all that is grown is needed.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

MODULUS = 10
OPERATIONS: Mapping[str, Callable[[int, int], int]] = {
    "plus": lambda a, b: (a + b) % MODULUS,
    "minus": lambda a, b: (a - b) % MODULUS,
    "times": lambda a, b: (a * b) % MODULUS,
}
COMMUTATIVE = frozenset({"plus", "times"})
CONSTANTS = (1, 2, 3, 4, 5)
MOST_OPEN = 4
"""Most quantities without a definition at a time while a graph grows."""
_ANIMALS = (
    "owls goats newts wolves cranes otters foxes hares moles swans toads bears deer larks crabs bees mice "
    "seals storks lynxes"
)
_THINGS = (
    "lamps chairs spoons clocks boxes kettles drums books coins ropes bells shelves pens cups plates rugs "
    "jars combs keys candles"
)
CONTEXTS: Mapping[str, tuple[str, ...]] = {"A": tuple(_ANIMALS.split()), "B": tuple(_THINGS.split())}
"""The names of each context; none has a name of another."""
NAMES = frozenset(name for names in CONTEXTS.values() for name in names)
TRIES = 10_000
"""Draws in a row that may bring nothing new, before what was drawn is taken for all that there is."""
_TIMES, _CONSTANT, _SHARED = 0.15, 0.5, 0.3


class GraphError(ValueError):
    """A text or a set of definitions that is no problem of this corpus."""


@dataclass(frozen=True)
class Definition:
    """One sentence of a question: `name` is a digit, or `operation` applied to two operands.

    The operands are names and integers: (digit,) of a leaf, (parent, constant), or (parent, other parent).
    """

    name: str
    operands: tuple[str | int, ...]
    operation: str | None = None

    @cached_property
    def parents(self) -> tuple[str, ...]:
        """The quantities from which this one is computed."""
        return tuple(operand for operand in self.operands if isinstance(operand, str))

    def value(self, values: Mapping[str, int]) -> int:
        """The value, given those of the parents."""
        numbers = [values[operand] if isinstance(operand, str) else operand for operand in self.operands]
        return numbers[0] if self.operation is None else OPERATIONS[self.operation](*numbers)


@dataclass(frozen=True)
class Graph:
    """The definitions of a question in the order in which it states them, and the quantity it asks for.

    Raises GraphError for a quantity that is defined twice or never, and for definitions in a circle.
    """

    definitions: tuple[Definition, ...]
    query: str

    def __post_init__(self) -> None:
        by_name = self.by_name
        if len(by_name) < len(self.definitions):
            raise GraphError("a quantity is defined twice")
        used = {parent for definition in self.definitions for parent in definition.parents} | {self.query}
        if undefined := sorted(used - by_name.keys()):
            raise GraphError(f"not defined: {', '.join(undefined)}")
        if len(self.in_order) < len(self.definitions):
            raise GraphError("definitions depend on each other in a circle")

    @cached_property
    def by_name(self) -> dict[str, Definition]:
        """The definition of each quantity."""
        return {definition.name: definition for definition in self.definitions}

    @cached_property
    def in_order(self) -> tuple[Definition, ...]:
        """All definitions, each after its parents; of those that could be next, the one stated first."""
        waiting, known, ordered = list(self.definitions), set[str](), []
        while ready := next((d for d in waiting if known.issuperset(d.parents)), None):
            waiting.remove(ready)
            known.add(ready.name)
            ordered.append(ready)
        return tuple(ordered)

    @cached_property
    def values(self) -> dict[str, int]:
        """The value of every quantity."""
        values: dict[str, int] = {}
        for definition in self.in_order:
            values[definition.name] = definition.value(values)
        return values

    def slipped_values(self, rng: random.Random, slip: float) -> dict[str, int]:
        """The values of a trace in which each operation has a wrong result with probability `slip`.

        What follows builds on a wrong result.
        """
        values: dict[str, int] = {}
        for definition in self.in_order:
            value = definition.value(values)
            slips = definition.operation is not None and rng.random() < slip
            values[definition.name] = (value + rng.randint(1, 9)) % 10 if slips else value
        return values

    @cached_property
    def needed(self) -> frozenset[str]:
        """The query and the quantities from which it is computed."""
        by_name, needed, open_names = self.by_name, set[str](), [self.query]
        while open_names:
            name = open_names.pop()
            if name not in needed:
                needed.add(name)
                open_names += by_name[name].parents
        return frozenset(needed)

    @cached_property
    def solution(self) -> tuple[Definition, ...]:
        """The needed definitions, each after its parents: the steps of the gold trace."""
        return tuple(definition for definition in self.in_order if definition.name in self.needed)

    @property
    def op(self) -> int:
        """Operations that the query needs."""
        return sum(definition.operation is not None for definition in self.solution)

    @property
    def answer(self) -> int:
        """The value of the query."""
        return self.values[self.query]

    def renamed(self, names: Mapping[str, str]) -> Graph:
        """The graph with other names for its quantities."""

        def change(definition: Definition) -> Definition:
            operands = tuple(names[o] if isinstance(o, str) else o for o in definition.operands)
            return Definition(names[definition.name], operands, definition.operation)

        return Graph(tuple(change(d) for d in self.definitions), names[self.query])

    def canonical_hash(self) -> str:
        """A hash of what the query needs: equal for two graphs exactly if renaming makes them the same.

        The order of sentences, distractors, and the order of the operands of plus and times do not matter.
        """
        return hashlib.sha256(_canonical(self).encode()).hexdigest()[:16]


def _canonical(graph: Graph) -> str:
    """The smallest text of a graph whose quantities are numbered as a walk from the query meets them.

    The walk visits the operands of plus and times in the order of their unfolded terms. Where these are equal
    (the operands may still be shared differently), both orders are tried.
    """
    by_name = graph.by_name
    terms: dict[str, str] = {}
    tied = []
    for definition in graph.solution:
        parts = [terms[o] if isinstance(o, str) else str(o) for o in definition.operands]
        if definition.operation in COMMUTATIVE and len(definition.parents) == 2:
            if parts[0] == parts[1]:
                tied.append(definition.name)
            parts.sort()
        terms[definition.name] = f"({definition.operation or ''} {' '.join(parts)})"

    def text(name: str, numbers: dict[str, int], swapped: frozenset[str]) -> str:
        if name in numbers:
            return f"#{numbers[name]}"
        numbers[name] = len(numbers)
        definition = by_name[name]
        operands = list(definition.operands)
        if definition.operation in COMMUTATIVE and len(definition.parents) == 2:
            operands.sort(key=lambda operand: terms[str(operand)])
            if name in swapped:
                operands.reverse()
        parts = [text(o, numbers, swapped) if isinstance(o, str) else str(o) for o in operands]
        return f"({definition.operation or ''} {' '.join(parts)})"

    choices = itertools.product(*([(), (name,)] for name in tied))
    return min(text(graph.query, {}, frozenset(itertools.chain(*choice))) for choice in choices)


def most_names(op: int, distractors: int) -> int:
    """Most names that a graph with `op` operations and so many distractors has."""
    return min(2 * op + 1, op + MOST_OPEN) + distractors


def grow(rng: random.Random, op: int) -> Graph:
    """A graph with exactly `op` operations, all of them needed, with numbers for names.

    Repeat `op` times: give a random open quantity an operation with a constant, or with a second parent. Each
    parent is another open quantity or a new one, which becomes open. What is still open at the end is a leaf.
    Parents are open when they are chosen, so there is no circle.
    """
    names = map(str, itertools.count())
    query = next(names)
    is_open, grown = [query], []
    for _ in range(op):
        full = len(is_open) >= MOST_OPEN
        name = is_open.pop(rng.randrange(len(is_open)))
        operation = "times" if rng.random() < _TIMES else rng.choice(("plus", "minus"))
        has_constant = full or rng.random() < _CONSTANT
        parents: list[str] = []
        for _ in range(1 if has_constant else 2):
            others = [other for other in is_open if other not in parents]
            if others and rng.random() < _SHARED:
                parents.append(rng.choice(others))
            else:
                parents.append(next(names))
                is_open.append(parents[-1])
        operands = (*parents, rng.choice(CONSTANTS)) if has_constant else tuple(parents)
        grown.append(Definition(name, operands, operation))
    leaves = [Definition(name, (rng.randrange(MODULUS),)) for name in is_open]
    return Graph((*leaves, *reversed(grown)), query)


def add_distractors(rng: random.Random, graph: Graph, count: int) -> Graph:
    """The graph with `count` quantities that nothing needs: leaves, and operations on any quantity."""
    definitions = list(graph.definitions)
    for k in range(count):
        name = f"extra {k}"
        if rng.random() < 0.5:
            definitions.append(Definition(name, (rng.randrange(MODULUS),)))
        else:
            parent = rng.choice(definitions).name
            operation = "times" if rng.random() < _TIMES else rng.choice(("plus", "minus"))
            definitions.append(Definition(name, (parent, rng.choice(CONSTANTS)), operation))
    return Graph(tuple(definitions), graph.query)


def reorder(rng: random.Random, graph: Graph, shuffled: bool) -> Graph:
    """The graph with its sentences in a random order: any, or one in which parents come first."""
    definitions = rng.sample(graph.definitions, len(graph.definitions))
    mixed = Graph(tuple(definitions), graph.query)
    return mixed if shuffled else Graph(mixed.in_order, graph.query)


def state(
    rng: random.Random, core: Graph, names: Sequence[str], distractors: tuple[int, int], shuffled: bool
) -> Graph:
    """A problem that asks what `core` asks: with distractors, an order of sentences, and names."""
    graph = reorder(rng, add_distractors(rng, core, rng.randint(*distractors)), shuffled)
    chosen = rng.sample(list(names), len(graph.definitions))
    return graph.renamed({d.name: name for d, name in zip(graph.definitions, chosen, strict=True)})


def distinct_cores(rng: random.Random, op: int) -> Iterator[Graph]:
    """Graphs with `op` operations of which no two are the same problem.

    Ends after `TRIES` graphs in a row that were there before: as good as all have been given. The rarest
    problem with one operation has probability 7.5e-4.
    """
    seen: set[str] = set()
    repeated = 0
    while repeated < TRIES:
        core = grow(rng, op)
        name = core.canonical_hash()
        repeated = repeated + 1 if name in seen else 0
        if name not in seen:
            seen.add(name)
            yield core
