"""RLPT: next-segment reasoning (arXiv 2509.19249): think, then predict the next sentence.

A document is cut into sentences. The model predicts a sentence either from the text before it (ASR,
autoregressive segment reasoning), or from the text before it and the sentence after it (MSR, middle segment
reasoning), in the ratio 1 : `msr_weight`. The rewards are:

- `information_gain`: how much likelier the thought made the segment's own tokens, in nats (our default, since
  it needs no second model).
- `match`: the model writes the segment between two delimiters; 1 if the text begins with its words, else 0.
- `judge`: as `match`, but a judge model decides whether it is a semantic prefix (the paper's reward).

The judge is any OpenAI-compatible server, or the policy itself (`rlpretrain/judge.py`). The reference is the
next `window` tokens of the document, since a prediction may cover more than a sentence; in MSR it is the
segment alone. A prediction of fewer than `min_words` words has reward 0, since a single safe word would be
enough otherwise. With a judge, the reward is also 0 for a copied piece of the context, and for a prediction
that the judge also accepts as the text of another position of the batch.

Our choices where the paper is silent: the ratio of the tasks, the shortest segment, the window, the fewest
words, the mean over a segment's tokens, and segments of a fixed number of tokens (`segments: tokens`; one
token without MSR is RLP).

Pitfalls: in MSR the no-think arm must see the following sentence too, as it does here, or the gain would be
due to that sentence. A base model that never saw the delimiters writes none; then `match` gives no signal.
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
"""The paper's prompt for the middle segment, in our words."""


@dataclass(kw_only=True)
class Config(base.Config):
    """RLPT's own fields."""

    target_length: Count = 64
    """Longest segment in tokens; longer ones are cut."""
    segments: Literal["sentence", "tokens"] = "sentence"
    """sentence: by the rules of `language`. tokens: `target_length` tokens from each of `positions`."""
    language: str = "en"
    """ISO code of the language whose rules end a sentence."""
    min_segment_tokens: Count = 4
    """Tokens of the shortest segment that is a target."""
    msr_weight: Amount = 0.5
    """Weight of the middle-segment task; the next segment has 1. 0 leaves it out.
    It is the paper's lambda, whose value the paper does not give.
    """
    msr_template: str = MSR
    """The prompt of the middle segment: a text with {context}."""
    mask: str = MASK
    """Text that replaces the middle segment."""
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
    """Tokens of the following text with which a written prediction is compared."""
    min_words: Count = 3
    """Fewest words of a written prediction that can have a reward."""
    judge_url: str | None = None
    """OpenAI-compatible server of the judge, without /v1.
    Without it and `judge_function` the policy judges itself.
    """
    judge_function: str | None = None
    """A judge of your own: package.module:function, an async function from prompts to replies."""
    judge_model: str = "judge"
    """The judge's name on the server."""
    judge_key: str | None = None
    """Environment variable that holds the server's token."""
    judge_timeout: Amount = 60.0
    """Seconds to wait for a reply before the request is repeated (three times)."""
    judge_failure: Literal["zero", "leave_out"] = "zero"
    """zero: a prediction that could not be judged has reward 0. leave_out: its thought does not count."""


class RLPT(base.Objective):
    """Reward a thought by how much it helps to predict the next segment."""

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
            server = endpoint(
                config.judge_url, config.judge_model, key=config.judge_key, timeout=config.judge_timeout
            )
            self.judge = Judge(server, config.judge_failure, self.counts)
        if config.reward != "information_gain":
            self.needs, self.answer_tokens = self.needs - {"target"}, config.max_prediction_tokens

    @property
    def min_length(self) -> int:
        """Tokens of the shortest document that has room for a position."""
        c = self.config
        return super().min_length if c.segments == "tokens" else max(2, c.min_context + c.min_segment_tokens)

    @property
    def added_tokens(self) -> int:
        """Those of the longer of the two prompts; that of the middle segment has a mask too."""
        middle = len(self.middle.head) + len(self.middle.tail) + len(self.mask) + 1
        return max(super().added_tokens, middle) if self.config.msr_weight else super().added_tokens

    @property
    def shortest_target(self) -> int:
        """A sentence may be shorter than `target_length`."""
        return super().shortest_target if self.config.segments == "tokens" else self.config.min_segment_tokens

    def positions(self, document: Document, rng: Any, trunk: Tensor | None = None) -> list[Position]:
        """Segments that have a segment before and after them; some are predicted from both sides."""
        c, ids = self.config, document.token_ids
        if c.segments == "tokens":
            return super().positions(document, rng, trunk)
        segments = self.segments(ids)
        chosen = []
        for k, (start, stop) in list(enumerate(segments))[1:-1]:
            if stop - start >= c.min_segment_tokens and start >= c.min_context:
                chosen.append(k)
        if len(chosen) > c.positions_per_document:
            chosen = sorted(int(k) for k in rng.choice(chosen, size=c.positions_per_document, replace=False))
        out = []
        for k in chosen:
            (start, stop), (_, after) = segments[k], segments[k + 1]
            is_middle = rng.random() < c.msr_weight / (1 + c.msr_weight)
            end = min(stop, start + c.target_length)
            if c.reward != "information_gain":
                end = stop if is_middle else min(len(ids), start + c.window)
            suffix = ids[stop:after] if is_middle else ()
            out.append(Position(document.id, start, ids[:start], ids[start:end], suffix))
        return out

    def segments(self, ids: Sequence[int]) -> list[tuple[int, int]]:
        """(first token, end) of each sentence that is more than white space; the end is exclusive."""
        # sentencex is a compiled module without stubs
        from sentencex import get_sentence_boundaries  # pyright: ignore[reportAttributeAccessIssue]

        special = set(self.tokenizer.all_special_ids)
        size = len(ids)
        while size and ids[size - 1] in special:  # the end-of-text token is in no sentence
            size -= 1
        text, starts = self.picker.text(ids[:size])
        sentences = get_sentence_boundaries(self.config.language, text)
        bounds = [bisect_left(starts, s["start_index"]) for s in sentences if s["text"].strip()] + [size]
        return [(a, b) for a, b in zip(bounds, bounds[1:], strict=False) if b > a]

    def prompt(self, position: Position) -> Prompt:
        """The prompt; that of a middle segment has a mask and the segment after it."""
        return self.middle(self._masked(position)) if position.suffix_ids else self.template(position)

    def no_think(self, position: Position) -> tuple[int, ...] | None:
        """The context of the no-think arm; it has the suffix too, so that the suffix adds no gain."""
        if not position.suffix_ids:
            return super().no_think(position)
        return self.middle.no_think(self._masked(position), "template")

    def _masked(self, position: Position) -> Position:
        return replace(position, context_ids=(*position.context_ids, *self.mask, *position.suffix_ids))

    async def add_rewards(self, engine: Engine, groups: list[Group]) -> list[Group]:
        """For `match` and `judge`: whether the predictions after the thoughts are right."""
        if self.config.reward == "information_gain":
            return groups
        if self.config.reward == "judge":
            rewards = await self.judged(engine, groups)
        else:
            rewards = []
            for group in groups:
                rewards.append([float(self.right(thought, group.position)) for thought in group.thoughts])
        return [replace(group, rewards=tuple(row)) for group, row in zip(groups, rewards, strict=True)]

    async def judged(self, engine: Engine, groups: Sequence[Group]) -> list[list[float]]:
        """The judge's verdicts on the written predictions.

        0 for a text that is too short, copies the context, or also fits another position of the batch.
        """
        judge = self.judge
        if judge is None:  # the policy judges itself, through an engine whose weights change
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
        # a text that the judge also accepts for another position's reference says nothing specific
        others = [next((r for r in references if r != reference), None) for reference in references]
        accepted = []
        for place, verdict in verdicts.items():
            other = others[place[0]]
            if verdict == 1 and other is not None:
                accepted.append((place, other))
        other_verdicts = await judge([(written[place], other) for place, other in accepted])
        for (place, _), verdict in zip(accepted, other_verdicts, strict=True):
            if verdict == 1:
                verdicts[place] = 0.0
        rewards = []
        for b, group in enumerate(groups):
            rewards.append([verdicts.get((b, g), 0.0) for g in range(len(group.thoughts))])
        return rewards

    def notes(self) -> dict[str, float]:
        """Requests to the judge since the last step, and the share that failed."""
        if self.config.reward != "judge":
            return {}
        counts = dict(self.counts)
        self.counts.update(dict.fromkeys(counts, 0))
        return {
            "objective/judge_asked": counts["asked"],
            "objective/judge_cached": counts["cached"],
            "objective/judge_failed_frac": counts["failed"] / max(counts["asked"], 1),
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
    """The ids that the model sees and could copy."""
    return (*position.context_ids, *position.suffix_ids)


OBJECTIVE = RLPT
