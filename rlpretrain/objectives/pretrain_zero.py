r"""PretrainZero: one model proposes what to hide in a paragraph, and finds it again (arXiv 2512.03442).

Two roles, one set of weights. The generator reads a paragraph, thinks, and names a span in `\mask{}`; for
each span the predictor reads the paragraph with the span replaced by `[mask]`, thinks, and names it in
`\boxed{}`.

    predictor   1 if the prediction is the span, else 0 generator   1 - the predictors' accuracy, but 0 where
    none of them finds it: noise is no task; 0 for a span that will not do

A span must stand in the paragraph verbatim, as whole words, at most `max_occurrences` times (the first is
hidden), be no longer than `max_span_tokens`, and hold no delimiter. A span that several thoughts name is
predicted once, and all of them earn the same. Of the predictors' groups, those that are all right or all
wrong are left out.

Ours: leave-one-out advantages (the paper divides by the deviation), the wording of both prompts, the limit in
tokens, which occurrence is hidden. The paper keeps spans that occur fewer than 8 times.

Pitfalls: a base model that never saw the task names no spans: begin with one that can (the paper gave SmolLM3
100 steps on random masks). Accuracy within a group is the generator's signal, so few thoughts make it coarse.
A step costs a round of predictors for every distinct span: `positions_per_step` paragraphs become up to
(thoughts + 1) times as many groups.
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
    """The predictor's."""
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
    """Longest span that will do."""
    max_occurrences: Count = 7
    """Times that a span may stand in its paragraph."""


class PretrainZero(base.Objective):
    """Learn to find what is hidden, and what is worth hiding."""

    Config = Config
    needs = frozenset()

    def __init__(self, config: Any, tokenizer: Any):
        super().__init__(config, tokenizer)
        self.answer_tokens = config.max_answer_tokens
        self.predictor = ThoughtPrompt(tokenizer, self.template.delimiters, config.predictor_template)

    @property
    def added_tokens(self) -> int:
        """The longer of the two prompts; the predictor's holds a mask too."""
        finder = len(self.predictor.head) + len(self.predictor.tail) + len(self._ids(self.config.mask)) + 1
        return max(len(self.template.head) + len(self.template.tail) + 1, finder)

    @property
    def shortest_target(self) -> int:
        """The whole paragraph is read."""
        return 0

    def positions(self, document: Document, rng: Any, trunk: Tensor | None = None) -> list[Position]:
        """The whole paragraph: its position is its end."""
        return [Position(document.id, len(document.token_ids), document.token_ids, ())]

    def prompt(self, position: Position) -> Prompt:
        """The generator's."""
        return self.template(replace(position, context_ids=self._ids(self.text(position))))

    async def rollout(
        self, engine: Engine, positions: Sequence[Position], seeds: Sequence[int]
    ) -> list[Group]:
        """A generator's group for each paragraph, and a predictor's for each distinct span of it."""
        c = self.config
        makers = await self.sample_thoughts(
            engine, positions, [self.prompt(p) for p in positions], seeds, role="generator"
        )
        makers = await self.sample_answers(engine, makers, c.closing)
        texts = [self.text(g.position) for g in makers]
        spans = [[self.span(t, text) for t in g.thoughts] for g, text in zip(makers, texts, strict=True)]
        tasks = [(b, span) for b, found in enumerate(spans) for span in dict.fromkeys(s for s in found if s)]
        places = [replace(makers[b].position, context_ids=self.hidden(texts[b], span)) for b, span in tasks]
        prompts = [self.predictor(p) for p in places]
        again = [base.derive_seed(seeds[b], 2 + k) for k, (b, _) in enumerate(tasks)]
        finders = (
            await self.sample_thoughts(engine, places, prompts, again, role="predictor") if tasks else []
        )
        finders = await self.sample_answers(engine, finders, c.closing)
        accuracy: dict[tuple[int, str], float] = {}
        for k, ((b, span), group) in enumerate(zip(tasks, finders, strict=True)):
            hits = tuple(float(self.prediction(t) == span) for t in group.thoughts)
            accuracy[b, span] = sum(hits) / len(hits)
            finders[k] = replace(group, rewards=hits, parent_id=makers[b].id, extra={"span": span})
        for b, group in enumerate(makers):
            rewards = (1 - accuracy[b, s] if s and accuracy[b, s] > 0 else 0.0 for s in spans[b])
            makers[b] = replace(group, rewards=tuple(rewards), extra={"spans": spans[b]})
        return makers + finders

    def select(self, groups: Sequence[Group]) -> list[Group]:
        """Groups whose thoughts do not all earn the same."""
        return [g for g in groups if base.rewards_differ(g)]

    def span(self, thought: Thought, text: str) -> str | None:
        """The span that a generator's thought names, if it will do."""
        found = (
            last_between(self.answer_text(thought), self.config.naming, self.config.closing) or ""
        ).strip()
        tags = self.template.delimiters
        marks = (tags.open, tags.close, self.config.mask, self.config.naming, self.config.opening)
        if (
            not found
            or any(mark in found for mark in marks)
            or len(self._ids(found, False)) > self.config.max_span_tokens
        ):
            return None
        return found if 0 < len(list(whole_words(found, text))) <= self.config.max_occurrences else None

    def hidden(self, text: str, span: str) -> tuple[int, ...]:
        """The paragraph's ids with the first occurrence of the span replaced by the mask."""
        at = next(whole_words(span, text)).start()
        return self._ids(text[:at] + self.config.mask + text[at + len(span) :])

    def prediction(self, thought: Thought) -> str | None:
        """What a predictor's thought names; None where it names nothing."""
        found = last_between(self.answer_text(thought), self.config.opening, self.config.closing)
        return None if found is None else found.strip()

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
