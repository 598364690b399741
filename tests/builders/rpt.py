"""Scripted answers for RPT."""

from __future__ import annotations

from rlpretrain.prompts import ensure_delimiters
from rollout.types import FinishReason, Thought
from tests.builders.tiny import bpe_tokenizer

LINES = ["the cat sat. naïve café 漢字 \\boxed{ the} \\boxed{x^{2}} so so", "<think> the </think> 42 } {"]
BPE = bpe_tokenizer(LINES, 330)
ensure_delimiters(BPE)
OPEN, CLOSE = BPE.convert_tokens_to_ids(["<think>", "</think>"])


def ids(text: str) -> tuple[int, ...]:
    return tuple(BPE(text)["input_ids"])


class Scripted:
    """Answers thoughts, then predictions, from a list; keeps what it was asked."""

    def __init__(self, thoughts: list[Thought], predictions: list[str]):
        self.thoughts, self.predictions, self.asked = thoughts, predictions, []

    async def sample(self, prompts, params, n, seeds):
        self.asked.append((prompts, params, n, seeds))
        if len(self.asked) == 1:
            return [self.thoughts for _ in prompts]
        out = []
        for text in self.predictions:
            tokens = ids(text)
            reason = FinishReason.CLOSE if text.endswith("}") else FinishReason.LENGTH
            out.append([Thought(tokens, (-2.0,) * len(tokens), reason, 5, 9)])
        return out
