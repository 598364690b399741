"""The verifier of the graphs corpus: which steps of a trace are right, and whether all of it is.

Nothing but the question, the trace and the answer is read, each by the templates of its surface. There is no
search for numbers in prose: a clause that fits no template was not said, and an answer other than a digit,
with or without a full stop, is wrong.

A step is right if it says what the question says (the same parents, operation and constant), quotes the true
values of the parents, and has the true value. A quantity with two different steps is wrong. `process` is the
share of needed quantities with a right step ("ProcessAcc" of arXiv 2512.07783, which compares parents and
values only). `verified` also needs the right answer, and that no step about another quantity is false: true
extra steps are allowed.
"""

from __future__ import annotations

from collections.abc import Mapping

from rlpretrain.corpora.graph_problems import COMMUTATIVE, Definition, Graph
from rlpretrain.corpora.graph_templates import DIGITS, Step, split_words
from rlpretrain.corpora.graph_text import parse, surface_of
from rlpretrain.verdict import Verdict


def verify(question: str, trace: str, answer: str) -> Verdict:
    """The verdict on a trace and an answer; GraphError (a ValueError) for a text that is no question.

    >>> question = "owls is 1 . goats is owls plus 2 . ask goats"
    >>> verify(question, "owls = 1 ; goats = owls 1 plus 2 = 3 ;", "3 .").verified
    True
    >>> verify(question, "goats = owls 1 plus 2 = 3 ;", "3 .")
    Verdict(process=0.5, answer_right=True, verified=False, malformed=0)
    """
    graph = parse(question)
    values = graph.values
    said, malformed = surface_of(question).read_steps(trace)
    steps: dict[str, set[object]] = {}
    for step in said:
        steps.setdefault(step.definition.name, set()).add(_content(step))
    right = {name for name, contents in steps.items() if contents == {_true_content(graph, name, values)}}
    needed = graph.needed
    answer_right = read_answer(answer) == values[graph.query]
    return Verdict(
        process=len(needed & right) / len(needed),
        answer_right=answer_right,
        verified=answer_right and needed <= right and steps.keys() == right,
        malformed=malformed,
    )


def read_answer(text: str) -> int | None:
    """The digit of an answer such as `3 .`; None for any other text."""
    words = split_words(text)
    return DIGITS.get(words[0]) if words[1:] in ([], ["."]) and words else None


def _content(step: Step) -> object:
    """What a step says, so that two steps are equal if they differ in the order of plus and times alone."""
    definition = step.definition
    quoted = iter(step.quoted)
    operands = [(str(o), next(quoted) if isinstance(o, str) else None) for o in definition.operands]
    if definition.operation in COMMUTATIVE and len(definition.parents) == 2:
        operands.sort()
    return definition.operation, tuple(operands), step.value


def _true_content(graph: Graph, name: str, values: Mapping[str, int]) -> object:
    """What a right step about a quantity says; None for a quantity that the question does not have."""
    definition: Definition | None = graph.by_name.get(name)
    if definition is None:
        return None
    quoted = tuple(values[parent] for parent in definition.parents)
    return _content(Step(definition, quoted, values[name]))
