"""Document formats of the dial corpus, and the mixes of them that a base model is pretrained on."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from rlpretrain.corpora.dial_problems import CLOSE, NAMES, OPEN, Problem, draw

HMM = tuple(["hmm", "well", "maybe", "wait", "so"])
"""Words of useless thoughts."""
_PROSE = (
    "the old the quiet a small river town harbour market garden winter morning evening light rain wind road "
    "bridge boat letter story teacher farmer sailor child walked looked waited sang slept across under along "
    "toward with and then"
)
PROSE = _PROSE.split()


@dataclass(frozen=True, slots=True)
class Mix:
    """Shares of the document formats in a base corpus, and the contents of its thoughts."""

    prose: float = 0.05
    chain: float = 0.15
    worked: float = 0.35
    think: float = 0.15
    plain: float = 0.30
    full_trace: float = 0.40
    part_trace: float = 0.10
    """Shares of the thoughts; the others are useless."""
    slip: float = 0.07
    worked_depths: tuple[int, int] = (1, 4)
    think_depths: tuple[int, int] = (1, 3)
    plain_depths: tuple[int, int] = (1, 6)
    refrain: float = 0.0
    """Share of the prose that is repeated."""
    deep: float = 0.0
    """Share of the thoughts that belong to problems of `deep_depths`."""
    deep_depths: tuple[int, int] = (5, 6)


_C6 = Mix(
    chain=0.10,
    worked=0.40,
    think=0.20,
    plain=0.25,
    full_trace=0.20,
    part_trace=0.05,
    worked_depths=(1, 6),
    think_depths=(1, 4),
    deep=0.05,
)
_C7 = replace(_C6, think=0.12, plain=0.33, full_trace=0.25)
MIXES = {
    "b9": Mix(),
    "d1": Mix(chain=0.10, worked=0.40, think=0.20, plain=0.25, full_trace=0.30, part_trace=0.05),
    "s20": Mix(think=0.20, plain=0.25),
    "c4": Mix(worked_depths=(1, 6), think_depths=(1, 4)),
    "c6": _C6,
    "c8": replace(_C7, prose=0.10, worked=0.38, plain=0.30, refrain=1.0),
    "c7": _C7,
}


def prose(rng: random.Random, mix: Mix) -> list[str]:
    """Words without meaning. A refrain repeats them, which teaches a small model to copy."""
    words = [*(rng.choice(PROSE) for _ in range(rng.randint(6, 14))), "."]
    return words + words if rng.random() < mix.refrain else words


def chain(rng: random.Random, mix: Mix) -> list[str]:
    """A running chain: every value follows its operation, and there is no question."""
    problem = draw(rng, (4, 4))
    return [NAMES[problem.first], "has", *problem.trace(rng, mix.slip), "."]


def worked(rng: random.Random, mix: Mix) -> list[str]:
    """A problem and its trace in plain text, without delimiters."""
    problem = draw(rng, mix.worked_depths)
    return [*problem.question(), ".", "so", *problem.trace(rng, mix.slip), "."]


def think(rng: random.Random, mix: Mix) -> list[str]:
    """A problem with a thought before its answer: a full trace, a part of one, or useless words."""
    problem, words = thought(rng, mix)
    return [*problem.question(), "shows", OPEN, *words, CLOSE, str(problem.answer), "."]


def thought(rng: random.Random, mix: Mix) -> tuple[Problem, list[str]]:
    """A problem, and a thought about it."""
    deep = mix.deep > 0 and rng.random() < mix.deep
    problem = draw(rng, mix.deep_depths if deep else mix.think_depths)
    kind = rng.random()
    if kind < mix.full_trace:
        return problem, problem.trace(rng, mix.slip)
    if kind < mix.full_trace + mix.part_trace:
        full = problem.trace(rng, mix.slip)
        return problem, full[: rng.randrange(1, len(full))]
    return problem, [rng.choice(HMM) for _ in range(rng.randint(1, 5))]


def plain(rng: random.Random, mix: Mix) -> list[str]:
    """A problem and its answer: the documents of reinforcement pretraining."""
    return plain_document(draw(rng, mix.plain_depths))


def plain_document(problem: Problem) -> list[str]:
    """`ann has 6 bob up3 cat times3 shows 7 .`"""
    return [*problem.question(), "shows", str(problem.answer), "."]


Formats = Mapping[str, Callable[[random.Random, Any], list[str]]]
FORMATS: Formats = {"prose": prose, "chain": chain, "worked": worked, "think": think, "plain": plain}
"""Document formats of a base mix; the share of each is the field of `Mix` with its name."""


def base_documents(count: int, seed: int, mix: Mix, formats: Formats = FORMATS) -> Iterator[str]:
    """`count` documents of a base mix."""
    rng = random.Random(f"dial base {seed}")
    shares = [getattr(mix, name) for name in formats]
    for kind in rng.choices(list(formats), shares, k=count):
        yield " ".join(formats[kind](rng, mix))
