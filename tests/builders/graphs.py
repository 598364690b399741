"""Problems of the graphs corpus, and a second way to read and solve the surface of words."""

from __future__ import annotations

import itertools
import random

from hypothesis import strategies as st

from rlpretrain.corpora.graph_problems import CONTEXTS, Graph, grow, state

SIGN = {"plus": lambda a, b: a + b, "minus": lambda a, b: a - b, "times": lambda a, b: a * b}


def problem(op: int, seed: int, context: str = "A", shuffled: bool = False, distractors: int = 2) -> Graph:
    rng = random.Random(seed)
    return state(rng, grow(rng, op), CONTEXTS[context], (0, distractors), shuffled)


SEEDS = st.integers(0, 2**32)
GRAPHS = st.builds(problem, st.integers(1, 9), SEEDS, st.sampled_from("AB"), st.booleans())


def definitions_of(question: str) -> tuple[dict[str, list[str]], str]:
    """The words after `is` of each quantity of a question in the surface of words, and what is asked for."""
    *sentences, ask = question.split(" . ")
    return {words.split()[0]: words.split()[2:] for words in sentences}, ask.removeprefix("ask ")


def solve(question: str) -> tuple[int, set[str], int]:
    """The answer of a question in the surface of words, what it needs, and its operations."""
    defined, query = definitions_of(question)
    needed: dict[str, int] = {}

    def value(word: str) -> int:
        if word.isdigit():
            return int(word)
        if word not in needed:
            first, *rest = defined[word]
            needed[word] = SIGN[rest[0]](value(first), value(rest[1])) % 10 if rest else int(first)
        return needed[word]

    answer = value(query)
    return answer, set(needed), sum(len(defined[name]) > 1 for name in needed)


def same_by_renaming(a: Graph, b: Graph) -> bool:
    """Whether some renaming makes two graphs without distractors the same, by trying all."""
    return len(a.definitions) == len(b.definitions) and _forms(a) == _forms(b)


def _forms(graph: Graph) -> frozenset[object]:
    """All that a graph can become by renaming; operands of plus and times are unordered."""
    names = [definition.name for definition in graph.definitions]
    forms = set()
    for numbers in itertools.permutations(range(len(names))):
        number = dict(zip(names, numbers, strict=True))
        parts = set()
        for d in graph.definitions:
            operands = [f"q{number[o]}" if isinstance(o, str) else f"{o}" for o in d.operands]
            if d.operation in ("plus", "times"):
                operands.sort()
            parts.add((number[d.name], d.operation, tuple(operands)))
        forms.add((frozenset(parts), number[graph.query]))
    return frozenset(forms)
