r"""PretrainZero: one model proposes what to hide in a paragraph, and finds it again (arXiv 2512.03442).

Two roles share one set of weights. The generator reads a paragraph, thinks, and names a span in `\mask{}`.
For each span the predictor reads the paragraph with the span replaced by `[mask]`, thinks, and names the span
in `\boxed{}`. The rewards are:

- predictor: 1 if the prediction is the span, else 0.
- generator: 1 - the predictors' accuracy. 0 if no predictor finds the span, since noise is not a task, and 0
  for an invalid span.

A valid span occurs in the paragraph verbatim, as whole words, at most `max_occurrences` times (the first is
hidden). It has at most `max_span_tokens` tokens and contains no delimiter. A span that several thoughts name
is predicted once, and all of these thoughts have the same reward. Groups of predictors that are all right or
all wrong are left out.

Our choices: leave-one-out advantages (the paper divides by the deviation: `advantage`), the wording of both
prompts, the limit in tokens, which occurrence is hidden. The paper keeps spans that occur fewer than 8 times.

Pitfalls: a base model that never saw the task names no spans; begin with a model that does (the paper trained
SmolLM3 on random masks for 100 steps). The generator's signal is the accuracy within a group, so few thoughts
make it coarse. A step samples a group of predictors for every distinct span: `positions_per_step` paragraphs
become up to (thoughts + 1) times as many groups.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from rewards.matching import last_between
from rlpretrain.config import Count
from rlpretrain.objectives import base
from rlpretrain.prompts import ThoughtPrompt
from rlpretrain.types import Document
from rollout.engine import Engine
from rollout.types import Group, Position, Prompt, Thought

MASK = "[mask]"
GENERATOR = (
    "Read the paragraph and set a small task in it: choose a short piece of its words that a careful reader "
    "could work out from the rest, neither obvious nor a guess, and that stands there only once. Think "
    "between {open} and {close}, then copy "
    "it, word for word, into \\mask{}.\n\n### Paragraph\n{context}\n\n"
)
PREDICTOR = (
    "In the paragraph below some words were replaced by [mask]. Work out which: think between {open} and "
    "{close}, then "
    "write exactly these words in \\boxed{}.\n\n### Paragraph\n{context}\n\n"
)


@dataclass(kw_only=True)
class Config(base.Config):
    """PretrainZero's own fields."""

    template: str = GENERATOR
    """The generator's instruction, in our words; raw or another text with {context}."""
    predictor_template: str = PREDICTOR
    """The predictor's instruction; raw or another text with {context}."""
    naming: str = "\\mask{"
    """Text before a span that the generator names."""
    opening: str = "\\boxed{"
    """Text before a prediction."""
    closing: str = "}"
    """Text that ends both, and sampling."""
    mask: str = MASK
    """Text that hides a span."""
    max_answer_tokens: Count = 48
    """Longest span or prediction, with its brackets."""
    max_span_tokens: Count = 16
    """Longest valid span."""
    max_occurrences: Count = 7
    """Most occurrences of a valid span in its paragraph."""
    advantage: base.AdvantageForm = "leave_one_out"
    """How the thoughts of a group are compared: leave_one_out, group_normalised (GRPO) or max_rl."""
    dynamic_sampling: bool = True
    """Leave out groups whose thoughts all have the same reward."""


class PretrainZero(base.Objective):
    """Learn to find hidden spans, and to choose spans that are worth hiding."""

    Config = Config
    needs = frozenset()

    def __init__(self, config: Any, tokenizer: Any):
        super().__init__(config, tokenizer)
        self.answer_tokens = config.max_answer_tokens
        self.predictor = ThoughtPrompt(tokenizer, self.template.delimiters, config.predictor_template)

    @property
    def added_tokens(self) -> int:
        """Those of the longer of the two prompts; the predictor's has a mask too."""
        mask_size = len(self._ids(self.config.mask))
        predictor = len(self.predictor.head) + len(self.predictor.tail) + mask_size + 1
        generator = len(self.template.head) + len(self.template.tail) + 1
        return max(generator, predictor)

    @property
    def shortest_target(self) -> int:
        """0: the whole paragraph is part of the prompt."""
        return 0

    def positions(self, document: Document, rng: Any, trunk: Tensor | None = None) -> list[Position]:
        """One position: the end of the paragraph, with the whole paragraph as context."""
        return [Position(document.id, len(document.token_ids), document.token_ids, ())]

    def prompt(self, position: Position) -> Prompt:
        """The generator's prompt."""
        return self.template(replace(position, context_ids=self._ids(self.text(position))))

    async def rollout(
        self, engine: Engine, positions: Sequence[Position], seeds: Sequence[int]
    ) -> list[Group]:
        """A generator's group for each paragraph, and a predictor's group for each distinct span in it."""
        prompts = [self.prompt(position) for position in positions]
        generators = await self.sample_thoughts(engine, positions, prompts, seeds, role="generator")
        generators = await self.sample_answers(engine, generators, self.config.closing)
        spans: list[list[str | None]] = []  # for each generator, the span of each thought
        tasks: list[tuple[int, str]] = []  # (generator, span) of each predictor
        masked: list[Position] = []
        for b, group in enumerate(generators):
            text = self.text(group.position)
            spans.append([self.span(thought, text) for thought in group.thoughts])
            for span in dict.fromkeys(span for span in spans[b] if span):
                tasks.append((b, span))
                masked.append(replace(group.position, context_ids=self.hidden(text, span)))
        predictors = await self._sample_predictors(engine, masked, [seeds[b] for b, _ in tasks])
        accuracy: dict[tuple[int, str], float] = {}
        for k, ((b, span), group) in enumerate(zip(tasks, predictors, strict=True)):
            hits = tuple(float(self.prediction(thought) == span) for thought in group.thoughts)
            accuracy[b, span] = sum(hits) / len(hits)
            predictors[k] = replace(group, rewards=hits, parent_id=generators[b].id, extra={"span": span})
        for b, group in enumerate(generators):
            rewards = [1 - accuracy[b, s] if s and accuracy[b, s] > 0 else 0.0 for s in spans[b]]
            generators[b] = replace(group, rewards=tuple(rewards), extra={"spans": spans[b]})
        return generators + predictors

    async def _sample_predictors(
        self, engine: Engine, masked: list[Position], parent_seeds: list[int]
    ) -> list[Group]:
        """A predictor's group with answers for each masked paragraph; seeds derive from the generators'."""
        if not masked:
            return []
        prompts = [self.predictor(position) for position in masked]
        seeds = [base.derive_seed(seed, 2 + k) for k, seed in enumerate(parent_seeds)]
        groups = await self.sample_thoughts(engine, masked, prompts, seeds, role="predictor")
        return await self.sample_answers(engine, groups, self.config.closing)

    def advantage(self, reward: Tensor, groups: Sequence[Group]) -> Tensor:
        """Advantages [B, G] in the form of the field `advantage`."""
        return base.ADVANTAGES[self.config.advantage](reward)

    def select(self, groups: Sequence[Group]) -> list[Group]:
        """The groups to train on; with `dynamic_sampling` only those whose rewards differ."""
        if not self.config.dynamic_sampling:
            return list(groups)
        return [g for g in groups if base.rewards_differ(g)]

    def span(self, thought: Thought, text: str) -> str | None:
        """The span that a generator's thought names; None if it is not valid."""
        c, tags = self.config, self.template.delimiters
        span = (last_between(self.answer_text(thought), c.naming, c.closing) or "").strip()
        delimiters = (tags.open, tags.close, c.mask, c.naming, c.opening)
        if not span or any(delimiter in span for delimiter in delimiters):
            return None
        if len(self._ids(span, False)) > c.max_span_tokens:
            return None
        occurrences = len(list(whole_words(span, text)))
        return span if 0 < occurrences <= c.max_occurrences else None

    def hidden(self, text: str, span: str) -> tuple[int, ...]:
        """The paragraph's ids with the first occurrence of the span replaced by the mask."""
        at = next(whole_words(span, text)).start()
        return self._ids(text[:at] + self.config.mask + text[at + len(span) :])

    def prediction(self, thought: Thought) -> str | None:
        """The span that a predictor's thought names; None if it names nothing."""
        span = last_between(self.answer_text(thought), self.config.opening, self.config.closing)
        return None if span is None else span.strip()

    def text(self, position: Position) -> str:
        """The paragraph as text."""
        return self.reader.text([i for i in position.context_ids if i not in self.picker.special])

    def _ids(self, text: str, special: bool = True) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=special)["input_ids"])


def whole_words(span: str, text: str):
    """The places of a span in a text, where it neither begins nor ends within a word."""
    head = r"(?<!\w)" if re.match(r"\w", span) else ""
    tail = r"(?!\w)" if re.search(r"\w$", span) else ""
    return re.finditer(head + re.escape(span) + tail, text)


OBJECTIVE = PretrainZero
