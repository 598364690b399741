"""The sets of a graphs corpus: what a user may ask for, and the problems that each set draws."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from rlpretrain.config import ConfigError
from rlpretrain.corpora.graph_problems import CONTEXTS, TRIES, Graph, distinct_cores, grow, most_names, state
from rlpretrain.corpora.graph_text import SURFACES


@dataclass(frozen=True, slots=True)
class Mix:
    """Shares of the document kinds in a base corpus."""

    worked: float
    """The question and its trace in plain text, without the tags of a thought."""
    direct: float
    """The question and its answer."""
    traced: float
    """The gold trace as a thought, then the answer."""
    idle: float
    """Useless words as a thought, then the answer."""
    copied: float = 0.1
    """Random words, said twice: practice in copying, since a trace copies from its question."""


MIXES: Mapping[str, Mix] = {
    "few_thoughts": Mix(worked=0.45, direct=0.20, traced=0.10, idle=0.15),
    "traces": Mix(worked=0.0, direct=0.1, traced=0.8, idle=0.0),
}
"""few_thoughts: the base can compute, but its thoughts are mostly useless. traces: its thoughts compute."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a graphs corpus consists of. ConfigError for what cannot be."""

    surface: str = "words"
    """words, for a small model from scratch, or sentences, for tokenizers that exist already."""
    ops: tuple[int, ...] = (1, 2, 3, 4, 5, 6)
    """Numbers of operations of the base documents."""
    weights: tuple[float, ...] | None = None
    """Share of each of `ops`, up to a factor; by default those of `WEIGHTS` for 1-6, else equal."""
    contexts: Mapping[str, float] = field(default_factory=lambda: {"A": 0.9, "B": 0.1})
    """Share of each context, up to a factor. Held-out problems are in all of them, a share of 0 too."""
    train_contexts: Mapping[str, float] | None = None
    """The same of the mid-training and RL sets; by default those of the base."""
    distractors: tuple[int, int] = (0, 2)
    """Fewest and most quantities of a problem that its query does not need."""
    order: Literal["topological", "shuffled"] = "topological"
    """Sentences after those that they refer to, or anywhere."""
    mix: str = "few_thoughts"
    slip: float = 0.0
    """Probability that a step of a trace in the base is wrong, while the answer is true; mid-training and the
    control have no wrong steps.
    """
    layers: int = 2
    """Layers of the model's configuration, with surface words."""
    base: int = 40_000
    mid: int = 5_000
    train: int = 10_000
    held_out: int = 1_600
    """Documents of all held-out cells together; each op in each context has as many."""
    mid_ops: tuple[int, ...] = (5, 6)
    train_ops: tuple[int, ...] = (5, 6)
    held_out_ops: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.surface not in SURFACES:
            raise ConfigError(f"no surface '{self.surface}': one of {', '.join(SURFACES)}")
        if self.mix not in MIXES:
            raise ConfigError(f"unknown mix '{self.mix}': one of {', '.join(MIXES)}")
        if self.order not in ("topological", "shuffled"):
            raise ConfigError(f"no order '{self.order}': topological or shuffled")
        if not 0 <= self.slip < 1:
            raise ConfigError(f"slip {self.slip}: expected a probability from 0 to below 1")
        if self.layers < 1:
            raise ConfigError(f"layers {self.layers}: expected at least 1")
        if self.layers != 2 and self.surface != "words":
            raise ConfigError(f"layers are those of the model of the surface words, not of {self.surface}")
        for name in ("ops", "mid_ops", "train_ops", "held_out_ops"):
            _check_ops(name, getattr(self, name))
        if self.weights is not None and len(self.weights) != len(self.ops):
            raise ConfigError(
                f"{len(self.weights)} weights for {len(self.ops)} ops {list(self.ops)}: give one for each"
            )
        _check_shares("weights", self.op_weights)
        _check_contexts(self.contexts)
        _check_contexts(self.contexts_of_training)
        if unknown := sorted(self.contexts_of_training.keys() - self.contexts.keys()):
            raise ConfigError(
                f"train contexts: {', '.join(unknown)} is not among the contexts: name it there, with weight "
                "0 if the base shall not have it"
            )
        self._check_names()
        cells = len(self.held_out_ops) * len(self.contexts)
        if self.held_out < cells:
            raise ConfigError(
                f"{self.held_out} held-out problems for {cells} cells (ops times contexts): ask for at least "
                f"{cells}"
            )
        if min(self.base, self.mid, self.train) < 1:
            raise ConfigError("every set needs at least one document")

    def _check_names(self) -> None:
        """Every problem must find a name for each of its quantities."""
        fewest, most = self.distractors
        if not 0 <= fewest <= most:
            raise ConfigError(f"distractors {fewest}-{most}: expected a range from 0 on")
        names = min(len(names) for names in CONTEXTS.values())
        op = max(*self.ops, *self.mid_ops, *self.train_ops, *self.held_out_ops)
        if (needed := most_names(op, most)) > names:
            raise ConfigError(
                f"a problem with {op} operations and {most} distractors has up to {needed} quantities, but a "
                f"context has {names} names: ask for fewer distractors or smaller ops"
            )

    @property
    def op_weights(self) -> tuple[float, ...]:
        """The share of each of `ops` in the base."""
        if self.weights is not None:
            return self.weights
        return WEIGHTS if self.ops == (1, 2, 3, 4, 5, 6) else (1.0,) * len(self.ops)

    @property
    def contexts_of_training(self) -> Mapping[str, float]:
        """The contexts of the mid-training and RL sets."""
        return self.contexts if self.train_contexts is None else self.train_contexts


WEIGHTS = (25.0, 25.0, 25.0, 19.0, 4.0, 2.0)
"""Shares of ops 1 to 6: 5 and 6 are rare, so that a small model cannot quite do them after pretraining."""


def _check_ops(name: str, ops: Sequence[int]) -> None:
    if not ops or min(ops) < 1 or len(set(ops)) < len(ops):
        raise ConfigError(f"{name} {list(ops)}: expected different whole numbers from 1 on")


def _check_shares(name: str, shares: Sequence[float]) -> None:
    if not all(math.isfinite(share) and share >= 0 for share in shares) or not sum(shares) > 0:
        raise ConfigError(f"{name} {list(shares)}: expected numbers from 0 on, not all of them 0")


def _check_contexts(contexts: Mapping[str, float]) -> None:
    if unknown := sorted(contexts.keys() - CONTEXTS.keys()):
        raise ConfigError(f"no context '{unknown[0]}': there are {', '.join(CONTEXTS)}")
    _check_shares("context weights", list(contexts.values()))


@dataclass(frozen=True, slots=True)
class Problem:
    """A problem as a set has it."""

    graph: Graph
    op: int
    context: str

    @property
    def cell(self) -> str:
        """Context and op in one word, as A5: what held-out numbers are split by."""
        return f"{self.context}{self.op}"


class Sets:
    """Draws the problems of each set; the same settings give the same problems.

    No problem of another set asks what a held-out problem asks, in any names, order or company of
    distractors. The other sets may share and repeat problems, as text does.
    """

    def __init__(self, settings: Settings):
        self.settings = settings
        self.held_out = list(self._held_out())
        self.held_out_hashes = {problem.graph.canonical_hash() for problem in self.held_out}

    def _held_out(self) -> Iterator[Problem]:
        """The same problems in every context, so that contexts can be compared problem by problem."""
        settings = self.settings
        wanted = settings.held_out // (len(settings.held_out_ops) * len(settings.contexts))
        rng = self._rng("held_out")
        for op in settings.held_out_ops:
            cores = list(itertools.islice(distinct_cores(rng, op), wanted))
            if len(cores) < wanted:
                raise ConfigError(
                    f"{wanted} different held-out problems with {op} operation{'s' * (op > 1)} were asked "
                    f"for, but there are only {len(cores)} ({TRIES} draws in a row brought no other): ask "
                    f"for fewer, or leave op {op} out"
                )
            for core, context in itertools.product(cores, settings.contexts):
                yield Problem(self._state(rng, core, context), op, context)

    def base(self, rng: random.Random) -> Problem:
        """A problem of the base."""
        settings = self.settings
        (op,) = rng.choices(settings.ops, settings.op_weights)
        return self._draw(rng, op, settings.contexts)

    def mid(self) -> Iterator[Problem]:
        """The problems of the mid-training set, their ops in turn."""
        return self._drawn("mid", self.settings.mid, self.settings.mid_ops)

    def train(self) -> Iterator[Problem]:
        """The problems of the RL prompts, their ops in turn."""
        return self._drawn("train", self.settings.train, self.settings.train_ops)

    def _drawn(self, name: str, count: int, ops: Sequence[int]) -> Iterator[Problem]:
        rng = self._rng(name)
        for i in range(count):
            yield self._draw(rng, ops[i % len(ops)], self.settings.contexts_of_training)

    def _draw(self, rng: random.Random, op: int, contexts: Mapping[str, float]) -> Problem:
        (context,) = rng.choices(list(contexts), list(contexts.values()))
        for _ in range(TRIES):
            core = grow(rng, op)
            if core.canonical_hash() not in self.held_out_hashes:
                return Problem(self._state(rng, core, context), op, context)
        raise ConfigError(
            f"{TRIES} problems in a row with {op} operation{'s' * (op > 1)} are held out: there are too few "
            "others. Hold out fewer, or leave this op out of training"
        )

    def _state(self, rng: random.Random, core: Graph, context: str) -> Graph:
        shuffled = self.settings.order == "shuffled"
        return state(rng, core, CONTEXTS[context], self.settings.distractors, shuffled)

    def _rng(self, name: str) -> random.Random:
        """Every set has a stream of its own, so that the size of one does not change another."""
        return random.Random(f"graphs {name} {self.settings.seed}")
