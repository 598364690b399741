"""Worked dial problems with a score for each sentence, for `objective: preference`.

A document is `ann has 6 bob up3 cat times3 . so 6 bob up3 9 cat times3 7 .`: a question, with the score 0,
and a trace, with its number of wrong steps. A program counts them, in the samples of a model too.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

from rlpretrain.corpora.dial_problems import OPERATIONS, Problem

SLIP = 0.3
"""Probability that a step of a trace is wrong."""


def wrong_steps(problem: Problem, words: Sequence[str]) -> int:
    """Steps of a trace that do not follow from the question and the value before; missing ones are wrong.

    A wrong start digit, and words behind the last step, count as a wrong step each.
    """
    value = problem.start
    wrong = int(list(words[:1]) != [str(value)]) + int(len(words) > 1 + 3 * problem.depth)
    for i, (name, operation, _) in enumerate(problem.steps()):
        step = list(words[1 + 3 * i : 4 + 3 * i])
        wrong += step != [name, operation, str(OPERATIONS[operation](value))]
        value = int(step[2]) if len(step) == 3 and step[2] in map(str, range(10)) else value
    return wrong


def scored_documents(problems: Iterator[Problem], seed: int, slip: float = SLIP) -> Iterator[dict[str, Any]]:
    """A row for each problem: `text`, and `spans` with the score of each sentence."""
    rng = random.Random(f"dial scored {seed}")
    for problem in problems:
        trace = problem.trace(rng, slip)
        question, answer = " ".join([*problem.question(), "."]), " ".join(["so", *trace, "."])
        text = f"{question} {answer}"
        spans = [[0, len(question), 0], [len(question) + 1, len(text), wrong_steps(problem, trace)]]
        yield {"text": text, "spans": spans}
