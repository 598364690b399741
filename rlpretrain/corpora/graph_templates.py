"""Templates of the graphs corpus: how a graph becomes text, and text becomes a graph again.

A template is a list of words and slots. Text is read by the templates that wrote it: it is split into words,
full stops and semicolons end a clause, and a clause that fits no template is not read.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias

from rlpretrain.corpora.graph_problems import NAMES, Definition, Graph, GraphError

Kind: TypeAlias = Literal["leaf", "constant", "pair"]
"""A quantity is a digit, an operation on a quantity and a constant, or one on two quantities."""

DIGITS: Mapping[str, int] = {str(digit): digit for digit in range(10)}
PUNCTUATION = ".;,:?"
"""Characters that are words of their own at the end of a word."""


@dataclass(frozen=True)
class Template:
    """A clause as words and slots, such as `{name} is {left} {op} {right}`.

    Slots: `name`, `left` and `right` are quantities; `constant`, `value`, `a` and `b` digits (`a` and `b` are
    the values of left and right); `op` is the word of an operation. `operation` is set if the words say it.
    """

    text: str
    operation: str | None = None

    @cached_property
    def words(self) -> tuple[str, ...]:
        """The words and slots that a clause is compared with."""
        return tuple(split_words(self.text))

    @cached_property
    def kind(self) -> Kind:
        """What it defines a quantity by."""
        return "pair" if "{right}" in self.words else "constant" if "{left}" in self.words else "leaf"

    def fits(self, definition: Definition) -> bool:
        """Whether it can say this definition."""
        if self.kind != kind_of(definition):
            return False
        return self.kind == "leaf" or "{op}" in self.words or self.operation == definition.operation


@dataclass(frozen=True, slots=True)
class Step:
    """A clause of a trace: a definition, the values that it quotes for the parents, and its own value."""

    definition: Definition
    quoted: tuple[int, ...]
    value: int


@dataclass(frozen=True, slots=True)
class Surface:
    """A way of writing problems and traces; the first template that fits is the plain one."""

    statements: tuple[Template, ...]
    steps: tuple[Template, ...]
    operations: Mapping[str, str]
    """Operation to its word in the templates' slot `op`."""
    preface: str
    """What every question begins with."""
    ask: str
    statement_end: str
    step_end: str
    answer: str
    worked: str
    """A worked solution in plain text, with the slots `trace` and `answer`."""

    def question(self, graph: Graph, rng: random.Random | None = None) -> str:
        """The question of a graph; without `rng` in the plain templates."""
        clauses = [self.preface] if self.preface else []
        for definition in graph.definitions:
            clauses.append(self._say(self.statements, definition, {}, rng) + self.statement_end)
        return " ".join([*clauses, self.ask.replace("{name}", graph.query)])

    def trace(
        self, graph: Graph, rng: random.Random | None = None, values: Mapping[str, int] | None = None
    ) -> str:
        """Every needed quantity with its operands, their values and its own; by default the gold trace."""
        values = graph.values if values is None else values
        steps = [self._say(self.steps, d, values, rng) + self.step_end for d in graph.solution]
        return " ".join(steps)

    def answer_text(self, graph: Graph) -> str:
        """The answer as a document writes it after the question or the thought."""
        return self.answer.format(answer=graph.answer)

    def parse(self, question: str) -> Graph:
        """The graph of a question; GraphError for a text that is no question of this surface."""
        words = split_words(question)
        preface, ask = split_words(self.preface), split_words(self.ask)
        body, asked = words[len(preface) : -len(ask)], _match(ask, words[-len(ask) :], self.operations)
        if words[: len(preface)] != preface or asked is None:
            raise GraphError("it does not begin and end as a question of this corpus does")
        definitions = []
        for clause in split_clauses(body):
            read = self._read(self.statements, clause)
            if read is None:
                raise GraphError(f"cannot read '{' '.join(clause)}'")
            definitions.append(read[0])
        return Graph(tuple(definitions), asked["name"])

    def read_steps(self, trace: str) -> tuple[list[Step], int]:
        """The clauses of a trace that can be read, and the number of those that cannot."""
        steps, malformed = [], 0
        for clause in split_clauses(split_words(trace)):
            read = self._read(self.steps, clause)
            if read is None:
                malformed += 1
                continue
            definition, slots = read
            quoted = tuple(DIGITS[slots[slot]] for slot in ("a", "b") if slot in slots)
            steps.append(Step(definition, quoted, DIGITS[slots["value"]]))
        return steps, malformed

    def _say(
        self,
        templates: Sequence[Template],
        definition: Definition,
        values: Mapping[str, int],
        rng: random.Random | None,
    ) -> str:
        """A definition in one of the templates that fit it."""
        fitting = [template for template in templates if template.fits(definition)]
        template = fitting[0] if rng is None else rng.choice(fitting)
        first, *rest = definition.operands
        slots: dict[str, object] = {"name": definition.name, "value": values.get(definition.name)}
        if definition.operation is None:
            slots["constant"] = first
        else:
            other = rest[0]
            slots |= {"op": self.operations[definition.operation], "left": first, "a": values.get(str(first))}
            slots |= {"right": other, "constant": other, "b": values.get(str(other))}
        return template.text.format(**slots)

    def _read(
        self, templates: Sequence[Template], clause: Sequence[str]
    ) -> tuple[Definition, dict[str, str]] | None:
        """The definition that a clause states, and its slots; None if no template fits."""
        for template in templates:
            slots = _match(template.words, clause, self.operations)
            if slots is None:
                continue
            if "left" not in slots:
                digit = slots["constant"] if "constant" in slots else slots["value"]
                return Definition(slots["name"], (DIGITS[digit],)), slots
            other = slots["right"] if "right" in slots else DIGITS[slots["constant"]]
            by_word = {word: operation for operation, word in self.operations.items()}
            operation = by_word[slots["op"]] if "op" in slots else template.operation
            return Definition(slots["name"], (slots["left"], other), operation), slots
        return None


def kind_of(definition: Definition) -> Kind:
    """What a definition defines its quantity by."""
    if definition.operation is None:
        return "leaf"
    return "pair" if len(definition.parents) == 2 else "constant"


def split_words(text: str) -> list[str]:
    """The words of a text; punctuation at the end of a word is a word of its own.

    >>> split_words("owls = 3. How many?")
    ['owls', '=', '3', '.', 'How', 'many', '?']
    """
    words = []
    for word in text.split():
        end = len(word)
        while end > 1 and word[end - 1] in PUNCTUATION:
            end -= 1
        words += [word[:end], *word[end:]]
    return words


def split_clauses(words: Iterable[str]) -> list[list[str]]:
    """Words between full stops and semicolons; clauses without words are left out.

    >>> split_clauses(["a", ".", ".", "b", "c", ";"])
    [['a'], ['b', 'c']]
    """
    clauses: list[list[str]] = [[]]
    for word in words:
        if word in (".", ";"):
            clauses.append([])
        else:
            clauses[-1].append(word)
    return [clause for clause in clauses if clause]


def _match(
    template: Sequence[str], words: Sequence[str], operations: Mapping[str, str]
) -> dict[str, str] | None:
    """The words in the slots of a template; None if other words or other kinds of words stand there.

    A slot that occurs twice must hold the same word.
    """
    if len(template) != len(words):
        return None
    kinds = {"name": NAMES, "left": NAMES, "right": NAMES, "op": operations.values()}
    slots: dict[str, str] = {}
    for expected, word in zip(template, words, strict=True):
        if not expected.startswith("{"):
            if word != expected:
                return None
            continue
        slot = expected[1:-1]
        if word not in kinds.get(slot, DIGITS) or slots.setdefault(slot, word) != word:
            return None
    return slots
