"""pass@k: how often one of k sampled answers is right, directly and after a thought.

A position is at the answer of a document (`data.answer_column`). The model samples its answer, and the answer
is right if its text is the true one; the likelihood of the true answer does not enter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from rewards.matching import final_answer
from rlpretrain.config import ConfigError
from rlpretrain.evaluation.intervals import interval, row_of
from rlpretrain.evaluation.pass_at_k import pass_at_k
from rlpretrain.evaluation.verdicts import Verdicts, judge_traces
from rlpretrain.models.lengths import limit_of
from rlpretrain.objectives import Objective
from rlpretrain.objectives.base import derive_seed
from rlpretrain.rollouts.drawing import document_number, prepare_held_out
from rlpretrain.scoring.unclosed import ids_before_answer
from rlpretrain.types import Document
from rlpretrain.verdict import Verifier
from rollout.blocking import wait_for_result
from rollout.hf import HFEngine
from rollout.types import FinishReason, Group, Position, Prompt, SamplingParams, Thought

ROWS = {"cpu": 64}
"""Answers that are sampled at once, by the kind of device."""
MANY_ROWS = 256  # on any other device


@dataclass(frozen=True, slots=True)
class AnswerRule:
    """Where an answer ends, which part of it counts, and what is right."""

    opening: str = ""
    """Text before the part that counts, for instance "####"; the last one. By default all counts."""
    closing: str = ""
    """Text after the part that counts, for instance "}" after "\\boxed{"; by default the answer's end."""
    stop: str = ""
    """Text that ends an answer, beside the end-of-text token."""

    def is_right(self, answer: str, truth: str) -> bool:
        """Whether the parts that count are equal, up to white space around them.

        An answer without `opening` is wrong; of a true answer without it, all counts.
        """
        part, true_part = (final_answer(text, self.opening, self.closing) for text in (answer, truth))
        return part == (truth.strip() if true_part is None else true_part)


@dataclass(frozen=True, slots=True)
class Answers:
    """n sampled answers at the position of each document; P positions."""

    documents: list[Document]
    correct: np.ndarray  # [P, n] bool
    texts: list[list[str]]  # [P][n]
    unfinished: np.ndarray  # [P, n] bool: the answer reached `max_answer_tokens`
    groups: list[Group]
    """The thoughts before the answers; none if the answers are direct."""
    ks: tuple[int, ...]
    verdicts: Verdicts | None = None
    """What a verifier says about thoughts and answers."""

    @property
    def rows(self) -> list[str]:
        """The source row of each position."""
        return [row_of(document.id) for document in self.documents]

    def by_position(self) -> dict[str, np.ndarray]:
        """[P] every pass@k, and with a verifier every verified@k and the share of right steps (process)."""
        numbers = {f"pass@{k}": pass_at_k(self.correct, k) for k in self.ks}
        if self.verdicts is not None:
            numbers |= {f"verified@{k}": pass_at_k(self.verdicts.verified, k) for k in self.ks}
            numbers["process"] = self.verdicts.process.mean(1)
        return numbers

    def summary(self) -> dict[str, Any]:
        """Each number with its 95% interval over source rows, and the shares of cut answers and thoughts."""
        numbers: dict[str, Any] = {}
        for name, values in self.by_position().items():
            numbers[name], numbers[f"{name}_ci"] = interval(values, rows=self.rows)
        numbers["unfinished"] = float(self.unfinished.mean())
        if self.groups:
            thoughts = [thought for group in self.groups for thought in group.thoughts]
            numbers["length"] = float(np.mean([len(thought.token_ids) for thought in thoughts]))
            closed = [thought.finish_reason is FinishReason.CLOSE for thought in thoughts]
            numbers["unclosed"] = 1.0 - float(np.mean(closed))
        return numbers

    def where(self, keep: Sequence[bool]) -> Answers:
        """The answers at some of the positions."""

        def kept(items: Sequence[Any]) -> list[Any]:
            return [item for item, wanted in zip(items, keep, strict=True) if wanted]

        mask = np.asarray(keep, bool)
        return replace(
            self,
            documents=kept(self.documents),
            correct=self.correct[mask],
            texts=kept(self.texts),
            unfinished=self.unfinished[mask],
            groups=kept(self.groups) if self.groups else [],
            verdicts=None if self.verdicts is None else self.verdicts.where(keep),
        )

    def minus(self, other: Answers, k: int) -> list[float]:
        """[difference of pass@k, low, high], paired by position; `other` is another model or way.

        Raises ValueError if the positions are not the same.
        """
        if [d.id for d in self.documents] != [d.id for d in other.documents]:
            raise ValueError("differences of pass@k need the same documents in the same order")
        mean, ends = interval(pass_at_k(self.correct, k) - pass_at_k(other.correct, k), rows=self.rows)
        return [mean, *ends]


def evaluate_answers(
    model: nn.Module,
    objective: Objective,
    documents: Sequence[Document],
    *,
    thinking: bool,
    n: int = 8,
    ks: Sequence[int] = (1, 4, 8),
    seed: int = 0,
    max_answer_tokens: int | None = None,
    answer_temperature: float | None = None,
    rule: AnswerRule | None = None,
    verifier: Verifier | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Answers:
    """Sample `n` answers to each document's prompt, each after a thought of its own if `thinking`.

    Thoughts are sampled as the objective's setting says, and those that do not close themselves are closed.
    So are answers, unless `answer_temperature` is set (0: the likeliest). Their length is at most
    `max_answer_tokens`, by default twice that of the longest true answer. All depends on `seed` and the
    document's id alone. A `verifier` also judges thoughts and answers together. `progress` is called with the
    numbers of positions done and of all.

    Raises ConfigError if documents have no answer, or rows do not fit the model.
    """
    ks = tuple(sorted({*ks}))
    if not ks or ks[0] < 1 or ks[-1] > n:
        raise ConfigError(f"pass@k for k in {list(ks)} needs at least as many answers: {n} are sampled")
    prepared = [prepare_held_out(objective, document, seed) for document in documents]
    documents = [document for document in prepared if document is not None]
    positions = [_position(document) for document in documents]
    if not positions:
        raise ConfigError(f"the objective's `prepare` dropped all {len(prepared)} documents")
    if thinking and not objective.has_positions:
        raise ConfigError(f"objective {type(objective).__name__} has no thoughts: answers are direct only")
    most = max_answer_tokens or 2 * max(len(position.target_ids) for position in positions)
    sampler = _Answerer(model, objective, n, most, answer_temperature, rule or AnswerRule())
    sampler.check_length(positions, thinking)
    parts = []
    for part in _in_parts(positions, max(1, sampler.rows // n)):
        seeds = [_seed_of(seed, position) for position in part]
        parts += sampler.after_thoughts(part, seeds) if thinking else sampler.direct(part, seeds)
        if progress is not None:
            progress(len(parts), len(positions))
    answers = sampler.judged(documents, positions, parts, ks)
    if verifier is None or not thinking:
        return answers
    return replace(answers, verdicts=judge_traces(verifier, objective, answers.groups, answers.texts))


@dataclass(frozen=True, slots=True)
class _Sampled:
    """The answers at one position, and the thoughts before them."""

    answers: list[Thought]
    group: Group | None = None


class _Answerer:
    """Samples answers, and compares them with the truth."""

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        n: int,
        most: int,
        temperature: float | None,
        rule: AnswerRule,
    ):
        self.objective = objective.with_setting(replace(objective.setting, thoughts=n))
        self.engine = HFEngine(model, tokenizer=objective.tokenizer)
        self.rows = ROWS.get(next(model.parameters()).device.type, MANY_ROWS)
        self.limit = limit_of(model)
        self.n, self.most, self.rule = n, most, rule
        self.params: SamplingParams = replace(objective.setting.params, max_thought_tokens=most)
        if temperature is not None:
            self.params = replace(self.params, temperature=temperature)

    def check_length(self, positions: Sequence[Position], thinking: bool) -> None:
        """Raise ConfigError if the longest row does not fit the model."""
        context = max(len(position.context_ids) for position in positions)
        thought = self.objective.setting.params.max_thought_tokens if thinking else 0
        around = self.objective.added_tokens + 1 if thinking else 0
        if self.limit is not None and context + around + thought + self.most > self.limit.tokens:
            raise ConfigError(
                f"{self.limit.reason}, but a prompt of {context} tokens with thoughts of up to {thought} and "
                f"answers of up to {self.most} needs {context + around + thought + self.most}: allow shorter "
                "thoughts or answers"
            )

    def direct(self, positions: Sequence[Position], seeds: Sequence[int]) -> list[_Sampled]:
        """n answers right after each context."""
        prompts = [self._prompt(position.context_ids) for position in positions]
        sampled = wait_for_result(self.engine.sample(prompts, self.params, self.n, seeds))
        return [_Sampled(answers) for answers in sampled]

    def after_thoughts(self, positions: Sequence[Position], seeds: Sequence[int]) -> list[_Sampled]:
        """n thoughts at each position, and an answer after each."""
        prompts = [self.objective.prompt(position) for position in positions]
        groups = wait_for_result(self.objective.sample_thoughts(self.engine, positions, prompts, seeds))
        heads = [
            self._prompt(ids_before_answer(group, index))
            for group in groups
            for index in range(len(group.thoughts))
        ]
        answer_seeds = [derive_seed(thought.seed) for group in groups for thought in group.thoughts]
        sampled = wait_for_result(self.engine.sample(heads, self.params, 1, answer_seeds))
        answers = iter([answer for (answer,) in sampled])
        return [_Sampled([next(answers) for _ in group.thoughts], group) for group in groups]

    def judged(
        self,
        documents: Sequence[Document],
        positions: Sequence[Position],
        sampled: Sequence[_Sampled],
        ks: tuple[int, ...],
    ) -> Answers:
        """The answers as texts, compared with the true ones."""
        texts, correct = [], []
        for position, of_position in zip(positions, sampled, strict=True):
            truth = self._text(position.target_ids, position)
            said = [self._text(answer.token_ids, position) for answer in of_position.answers]
            texts.append(said)
            correct.append([self.rule.is_right(text, truth) for text in said])
        unfinished = [[a.finish_reason is FinishReason.LENGTH for a in each.answers] for each in sampled]
        groups = [each.group for each in sampled if each.group is not None]
        return Answers(list(documents), np.array(correct), texts, np.array(unfinished), groups, ks)

    def _prompt(self, ids: tuple[int, ...]) -> Prompt:
        stops = (self.rule.stop,) if self.rule.stop else ()
        return Prompt(ids, stop_ids=(), stop_strings=stops)

    def _text(self, ids: Sequence[int], position: Position) -> str:
        """The text of an answer: up to its end-of-text token and the stop text."""
        ends = [i for i, token in enumerate(ids) if token in self.params.eos_ids]
        text = self.objective.reader.text(ids[: ends[0]] if ends else ids, after=position.context_ids)
        return text.partition(self.rule.stop)[0] if self.rule.stop else text


def _position(document: Document) -> Position:
    """The position at the answer of a document; its target is the whole answer."""
    at, ids = document.answer_at, document.token_ids
    if at is None:
        raise ConfigError(
            f"document {document.id} ({document.source}) has no answer: set data.answer_column "
            "(--answer-column)"
        )
    return Position(document.id, at, ids[:at], ids[at:])


def _seed_of(seed: int, position: Position) -> int:
    rng = np.random.default_rng((seed, document_number(position.document_id)))
    return int(rng.integers(2**62))


def _in_parts(positions: Sequence[Position], size: int) -> Iterator[Sequence[Position]]:
    for first in range(0, len(positions), size):
        yield positions[first : first + size]
