"""An engine that says what a test wants: fixed words, or the document's own next words."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rlpretrain.rollouts.engines import EngineContext
from rollout.engine import EngineInfo
from rollout.types import FinishReason, Prompt, SamplingParams, Thought, WeightSource


class Scripted:
    """`engine.options`: `say` is a list of texts, one for each thought of a prompt in turn; `copy` is a
    number of words that follow in the document. `ending` is a finish reason.
    """

    def __init__(self, context: EngineContext):
        self.tokenizer, self.options = context.tokenizer, context.settings.options
        self.version, self.info = 0, EngineInfo(needs_probe=False)
        lines = Path(context.config.data.path).read_text().splitlines()
        self.documents = [
            tuple(self.ids(json.loads(line)["text"])) for line in lines if "copy" in self.options
        ]

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    async def sample(
        self, prompts: Sequence[Prompt], params: SamplingParams, n: int, seeds: Sequence[int]
    ) -> list[list[Thought]]:
        return [
            [self.think(prompt, k, seed) for k in range(n)]
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]

    def think(self, prompt: Prompt, k: int, seed: int) -> Thought:
        if "copy" in self.options:
            context = prompt.token_ids[:-1]
            (own, *_) = [ids for ids in self.documents if ids[: len(context)] == context]
            ids = own[len(context) : len(context) + self.options["copy"]]
        else:
            words = self.options["say"]
            ids = tuple(self.ids(words[k % len(words)]))
        reason = FinishReason(self.options.get("ending", "close"))
        end = {FinishReason.CLOSE: prompt.stop_ids[:1], FinishReason.EOS: (self.tokenizer.eos_token_id,)}
        ids = (*ids, *end.get(reason, ()))
        return Thought(ids, (0.0,) * len(ids), reason, self.version, seed + k)

    def sync(self, weights: WeightSource, version: int) -> None:
        self.version = version

    def health(self) -> dict[str, str]:
        return {"kind": "scripted"}

    def close(self) -> None:
        pass
