"""RLPT: next-segment reasoning (arXiv 2509.19249). Think, then the next sentence.

A document is cut into sentences. The model predicts one of them either from what stands before it (ASR,
autoregressive segment reasoning) or from what stands before and the sentence after it (MSR, middle segment
reasoning), in the ratio 1 : `msr_weight`.

- `information_gain`: how much likelier the thought made the segment's own tokens, in nats (our default, since
  it needs no second model).
- `match`: the model writes the segment between two delimiters; 1 if the text begins with its words, else 0.
- `judge`: the same, but a judge model says whether it is a semantic prefix (the paper's reward).

The judge is any OpenAI-compatible server, or the policy itself (`rlpretrain/judge.py`). The reference is
`window` tokens of what follows, since a prediction may cover more than a sentence; in MSR the segment alone.
A prediction of fewer than `min_words` words earns nothing, however right: else one safe word would do. Nor
does, with a judge, a piece of the context copied out, nor what the judge also accepts for the text of another
position of the batch: it fits everywhere.

Ours where the paper is silent: the ratio of the tasks, the shortest segment, the window, the fewest words,
the mean over a segment's tokens, and segments of a fixed number of tokens (`segments: tokens`, with which one
token and no MSR is RLP).

Pitfalls: in MSR the arm without a thought must see the following sentence too, or the gain is that
sentence's; it does. A base that never saw the delimiters writes none, and `match` then teaches nothing.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor

from rewards import information_gain
from rewards.matching import last_between
from rlpretrain.config import Amount, ConfigError, Count
from rlpretrain.judge import Judge, by_path, endpoint, engine_judge, worth_judging
from rlpretrain.objectives import base
from rlpretrain.prompts import ThoughtPrompt
from rlpretrain.types import Document, Scores
from rollout.engine import Engine
from rollout.types import Group, Position, Prompt, Thought

MASK = "<MASK>"
MSR = (
    "A sentence is missing from the text below, where it says <MASK>; what comes after it is there. Think "
    "between {open} and "
    "{close} about what must have been said, then say it.\n\n### Context\n{context}\n\n"
)
"""Says what the paper's prompt for the middle segment says, in our words."""


@dataclass(kw_only=True)
class Config(base.Config):
    """RLPT's own fields."""

    target_length: Count = 64
    """Longest segment in tokens; longer ones are cut."""
    segments: Literal["sentence", "tokens"] = "sentence"
    """sentence: as `language` has them. tokens: `target_length` tokens from where `positions` says."""
    language: str = "en"
    """ISO code of the language whose rules end a sentence."""
    min_segment_tokens: Count = 4
    """Shorter segments are no targets."""
    msr_weight: Amount = 0.5
    """Weight of the middle-segment task beside 1 for the next segment; 0 leaves it out. The paper's lambda,
    whose value it does not give.
    """
    msr_template: str = MSR
    """The prompt of the middle segment: a text with {context}."""
    mask: str = MASK
    """Text that stands for the middle segment."""
    reward: Literal["information_gain", "match", "judge"] = "information_gain"
    """What a thought earns; see the objective's documentation."""
    reduction: Literal["sum", "mean"] = "mean"
    """Gain of a segment: sum or mean over its tokens."""
    clip: float | None = None
    """Largest absolute gain of a single token, in nats."""
    opening: str = "<|startofprediction|>"
    """Text before a written prediction."""
    closing: str = "<|endofprediction|>"
    """Text that ends it, and sampling."""
    max_prediction_tokens: Count = 128
    """Longest written prediction."""
    window: Count = 128
    """Tokens of what follows that a written prediction is compared with."""
    min_words: Count = 3
    """Fewest words of a written prediction that can earn anything."""
    judge_url: str | None = None
    """OpenAI-compatible server of the judge, without /v1; none, and no `judge_function`: the policy judges
    itself.
    """
    judge_function: str | None = None
    """Or a judge of your own: package.module:function, an async function from prompts to replies."""
    judge_model: str = "judge"
    """Its name there."""
    judge_key: str | None = None
    """Environment variable that holds the server's token."""
    judge_timeout: Amount = 60.0
    """Seconds for a reply, before it is asked for again (three times)."""
    judge_failure: Literal["zero", "leave_out"] = "zero"
    """A prediction that could not be judged earns 0, or counts nowhere."""


class RLPT(base.Objective):
    """Reward a thought by what it does for the next segment."""

    Config = Config

    def __init__(self, config: Any, tokenizer: Any):
        super().__init__(config, tokenizer)
        if config.segments == "tokens" and config.msr_weight:
            raise ConfigError(
                "objective.segments tokens has no middle segments: set objective.msr_weight to 0"
            )
        self.middle = ThoughtPrompt(tokenizer, self.template.delimiters, config.msr_template)
        self.mask = tuple(tokenizer(config.mask, add_special_tokens=False)["input_ids"])
        self.judge: Judge | None = None
        self.counts = {"asked": 0, "cached": 0, "failed": 0}
        if config.reward == "judge" and config.judge_function:
            self.judge = Judge(by_path(config.judge_function), config.judge_failure, self.counts)
        elif config.reward == "judge" and config.judge_url:
            self.judge = Judge(
                endpoint(
                    config.judge_url, config.judge_model, key=config.judge_key, timeout=config.judge_timeout
                ),
                config.judge_failure,
                self.counts,
            )
        if config.reward != "information_gain":
            self.needs, self.answer_tokens = self.needs - {"target"}, config.max_prediction_tokens

    @property
    def min_length(self) -> int:
        """Tokens of the shortest document that has room for a position."""
        c = self.config
        return super().min_length if c.segments == "tokens" else max(2, c.min_context + c.min_segment_tokens)

    @property
    def added_tokens(self) -> int:
        """The longer of the two prompts; that of the middle segment holds a mask too."""
        middle = len(self.middle.head) + len(self.middle.tail) + len(self.mask) + 1
        return max(super().added_tokens, middle) if self.config.msr_weight else super().added_tokens

    @property
    def shortest_target(self) -> int:
        """A sentence may be shorter than `target_length`."""
        return super().shortest_target if self.config.segments == "tokens" else self.config.min_segment_tokens

    def positions(self, document: Document, rng: Any, trunk: Tensor | None = None) -> list[Position]:
        """Segments with another before and another after them; some to be predicted from both sides."""
        c, ids = self.config, document.token_ids
        if c.segments == "tokens":
            return super().positions(document, rng, trunk)
        found = self.segments(ids)
        inner = [
            k
            for k in range(1, len(found) - 1)
            if found[k][1] - found[k][0] >= c.min_segment_tokens and found[k][0] >= c.min_context
        ]
        if len(inner) > c.positions_per_document:
            inner = sorted(int(k) for k in rng.choice(inner, size=c.positions_per_document, replace=False))
        out = []
        for k in inner:
            (start, stop), (_, after) = found[k], found[k + 1]
            both = rng.random() < c.msr_weight / (1 + c.msr_weight)
            end = min(stop, start + c.target_length)
            if c.reward != "information_gain":
                end = stop if both else min(len(ids), start + c.window)
            out.append(
                Position(document.id, start, ids[:start], ids[start:end], ids[stop:after] if both else ())
            )
        return out

    def segments(self, ids: Sequence[int]) -> list[tuple[int, int]]:
        """(first token, one after the last) of each sentence that is more than white space."""
        from sentencex import get_sentence_boundaries

        special = set(self.tokenizer.all_special_ids)
        size = len(ids)
        while size and ids[size - 1] in special:  # the end of text
            size -= 1
        text, starts = self.picker.text(ids[:size])
        sentences = get_sentence_boundaries(self.config.language, text)
        bounds = [bisect_left(starts, s["start_index"]) for s in sentences if s["text"].strip()] + [size]
        return [(a, b) for a, b in zip(bounds, bounds[1:], strict=False) if b > a]

    def prompt(self, position: Position) -> Prompt:
        """The prompt; for a middle segment with a mask and the segment after it."""
        return self.middle(self._masked(position)) if position.suffix_ids else self.template(position)

    def no_think(self, position: Position) -> tuple[int, ...] | None:
        """The context of the no-think arm; it has the suffix too, whose gain must not count."""
        if not position.suffix_ids:
            return super().no_think(position)
        return self.middle.no_think(self._masked(position), "template")

    def _masked(self, position: Position) -> Position:
        return replace(position, context_ids=(*position.context_ids, *self.mask, *position.suffix_ids))

    async def add_rewards(self, engine: Engine, groups: list[Group]) -> list[Group]:
        """For `match` and `judge`: whether what was written after the thoughts is right."""
        if self.config.reward == "information_gain":
            return groups
        if self.config.reward == "judge":
            rewards = await self.judged(engine, groups)
        else:
            rewards = [[float(self.right(t, g.position)) for t in g.thoughts] for g in groups]
        return [replace(g, rewards=tuple(r)) for g, r in zip(groups, rewards, strict=True)]

    async def judged(self, engine: Engine, groups: Sequence[Group]) -> list[list[float]]:
        """The judge's verdicts on what was written.

        0 for a text that is too short, copies the context, or also fits another position of the batch.
        """
        judge = self.judge
        if judge is None:  # the policy judges itself, by an engine whose weights change
            judge = Judge(engine_judge(engine, self.tokenizer), self.config.judge_failure, self.counts)
        written: dict[tuple[int, int], str] = {}
        for b, group in enumerate(groups):
            for g, thought in enumerate(group.thoughts):
                written[b, g] = self.written(thought)
        contexts = [self._text(_around(group.position)) for group in groups]
        references = [self._text(group.position.target_ids) for group in groups]
        least = self.config.min_words
        asked = [place for place, text in written.items() if worth_judging(text, contexts[place[0]], least)]
        answers = await judge([(written[b, g], references[b]) for b, g in asked])
        verdicts = dict(zip(asked, answers, strict=True))
        # a text that the judge also accepts for another position's reference fits everywhere
        others = [next((r for r in references if r != reference), None) for reference in references]
        again = []
        for place, verdict in verdicts.items():
            other = others[place[0]]
            if verdict == 1 and other is not None:
                again.append((place, other))
        elsewhere = await judge([(written[place], other) for place, other in again])
        for (place, _), verdict in zip(again, elsewhere, strict=True):
            if verdict == 1:
                verdicts[place] = 0.0
        return [
            [verdicts.get((b, g), 0.0) for g in range(len(group.thoughts))] for b, group in enumerate(groups)
        ]

    def notes(self) -> dict[str, float]:
        """Requests to the judge since the last step, and the share that failed."""
        if self.config.reward != "judge":
            return {}
        seen = dict(self.counts)
        self.counts.update(dict.fromkeys(seen, 0))
        return {
            "objective/judge_asked": seen["asked"],
            "objective/judge_cached": seen["cached"],
            "objective/judge_failed_frac": seen["failed"] / max(seen["asked"], 1),
        }

    def written(self, thought: Thought) -> str:
        """The text between the last pair of delimiters after a thought; empty where there is none."""
        text = last_between(self.answer_text(thought), self.config.opening, self.config.closing)
        return (text or "").strip()

    def _text(self, ids: Sequence[int]) -> str:
        return self.reader.text([i for i in ids if i not in self.picker.special]).strip()

    def right(self, thought: Thought, position: Position) -> bool:
        """Whether the text continues with the words written after a thought."""
        predicted, true = self.written(thought).split(), self._text(position.target_ids).split()
        return len(predicted) >= self.config.min_words and true[: len(predicted)] == predicted

    def reward(self, groups: Sequence[Group], scores: Scores) -> Tensor:
        """The gain in nats, or the matches [B, G]."""
        c = self.config
        if c.reward != "information_gain":
            return super().reward(groups, scores)
        return information_gain(
            scores.target_logps, scores.baseline_logps, scores.target_mask, reduction=c.reduction, clip=c.clip
        )


def _around(position: Position) -> tuple[int, ...]:
    """All that the model could copy."""
    return (*position.context_ids, *position.suffix_ids)


OBJECTIVE = RLPT
