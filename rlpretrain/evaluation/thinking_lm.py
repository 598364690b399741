"""The model of lm-eval's harness: lm-eval's own, and one that thinks before it answers.

These classes subclass lm-eval's, so this module is imported only when tasks are asked for
(rlpretrain/evaluation/harness.py).
"""

from __future__ import annotations

import copy
import zlib
from collections import Counter, defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from torch import Tensor, nn
from tqdm import tqdm

from rlpretrain.config import ConfigError
from rlpretrain.models.lengths import limit_of
from rlpretrain.objectives import Objective
from rlpretrain.ranks import Ranks
from rlpretrain.scoring.unclosed import ids_before_answer
from rollout.blocking import wait_for_result
from rollout.hf import HFEngine
from rollout.types import FinishReason, Position

Harness: Any = HFLM  # the decorator on the class hides its type

THOUGHTS_PER_ROW = 4
"""Thoughts that are decoded at once, for each row that is scored at once. A scored row holds logits of
tokens x vocabulary, a decoded one only its cache.
"""


class DirectLM(Harness):
    """lm-eval's model, for a model that is loaded already. The examples of a task are shared by the ranks."""

    def __init__(self, model: nn.Module, tokenizer: Any, batch_size: int, ranks: Ranks):
        own_tokenizer = copy.deepcopy(tokenizer)  # the harness may give it a padding token
        super().__init__(pretrained=model, backend="causal", tokenizer=own_tokenizer, batch_size=batch_size)
        self.ranks = ranks
        self._rank, self._world_size = ranks.rank, ranks.size

    def all_gather(self, tensor: Tensor) -> Tensor:
        """This rank's number in the place of all: the harness would pad the requests of the others with it.

        No padding is needed, since each rank has the whole model and waits for no other.
        """
        return tensor.reshape(-1)[:1].repeat(self.ranks.size)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """The objects of all ranks on rank `dst`, None on the others."""
        gathered = self.ranks.gather(obj)
        return gathered if self.ranks.rank == dst else None

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.ranks.barrier()


@dataclass(slots=True)
class ThoughtCounts:
    """What was sampled before the answers."""

    thoughts: int = 0
    tokens: int = 0
    unclosed: int = 0
    """Thoughts that did not close themselves; a close tag was added."""
    cut: int = 0
    """Contexts that lost tokens at their beginning, because thought and answer have to fit too."""


Key = tuple[tuple[int, ...], int]
"""The ids of a context, and the number of the thought in it."""


class ThinkingLM(DirectLM):
    """The same model with a sampled thought between each context and what is scored or generated.

    The objective makes the prompt from the harness's token ids of the context, and a thought that does not
    close itself gets a close tag. A thought depends on the seed and the context alone, so all choices of a
    question that share their context are scored after the same thought. A context that is asked several times
    for a generated answer (`repeats`) gets as many thoughts.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        batch_size: int,
        ranks: Ranks,
        *,
        objective: Objective,
        seed: int,
    ):
        super().__init__(model, tokenizer, batch_size, ranks)
        self.objective = objective.with_setting(replace(objective.setting, thoughts=1))
        self.engine = HFEngine(model, tokenizer=objective.tokenizer, batch_size=THOUGHTS_PER_ROW * batch_size)
        self.seed = seed
        self.counts = ThoughtCounts()
        self._heads: dict[str, deque[tuple[int, ...]]] = {}
        limit = limit_of(model)
        self._most = min(self.max_length, limit.tokens) if limit else self.max_length

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Not possible: the text of such a task has no place for a thought."""
        raise ConfigError("a task that scores whole texts (loglikelihood_rolling) has no place for a thought")

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """The harness's log-probabilities of continuations, after context and thought.

        `requests` are (texts, context ids, continuation ids), as lm-eval's `loglikelihood` tokenises them.
        """
        after: dict[Key, int] = defaultdict(int)
        for _, context, continuation in requests:
            key = (tuple(context), 0)
            after[key] = max(after[key], len(continuation))
        heads = self.think(after)
        with_thoughts = [
            (texts, list(heads[tuple(context), 0]), continuation) for texts, context, continuation in requests
        ]
        return super()._loglikelihood_tokens(with_thoughts, disable_tqdm, override_bs)

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """The harness's generation, after context and thought."""
        texts = [request.args[0] for request in requests]
        room: dict[str, int] = defaultdict(int)
        for text, request in zip(texts, requests, strict=True):
            settings: Any = normalize_gen_kwargs(request.args[1], self.max_gen_toks)
            room[text] = max(room[text], settings["max_gen_toks"])
        keys = {
            text: [(tuple(self.tok_encode(text)) or (self.prefix_token_id,), k) for k in range(times)]
            for text, times in Counter(texts).items()
        }
        heads = self.think({key: room[text] for text, of_text in keys.items() for key in of_text})
        self._heads = {text: deque(heads[key] for key in of_text) for text, of_text in keys.items()}
        return super().generate_until(requests, disable_tqdm)

    def tok_batch_encode(
        self,
        strings: Sequence[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """The ids of contexts with their thoughts, padded on the left; `generate_until` continues these."""
        rows = [self._heads[text].popleft() for text in strings]
        width = max(len(row) for row in rows)
        ids = torch.full((len(rows), width), self.tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, width - len(row) :] = torch.tensor(row)
            mask[i, width - len(row) :] = 1
        return ids, mask

    def think(self, after: Mapping[Key, int]) -> dict[Key, tuple[int, ...]]:
        """Sample a thought for each key; the ids of context, thought, close tag and joining ids.

        `after[key]` is how many tokens have to fit after these.
        """
        keys = sorted(after, key=lambda key: len(key[0]))
        heads: dict[Key, tuple[int, ...]] = {}
        with tqdm(total=len(keys), desc="Sampling thoughts", disable=not self.ranks.first) as bar:
            for first in range(0, len(keys), self.engine.batch_size):
                part = keys[first : first + self.engine.batch_size]
                heads |= zip(part, self._sample(part, after), strict=True)
                bar.update(len(part))
        return heads

    def _sample(self, keys: Sequence[Key], after: Mapping[Key, int]) -> list[tuple[int, ...]]:
        positions = [self._position(context, after[context, k]) for context, k in keys]
        prompts = [self.objective.prompt(position) for position in positions]
        seeds = [_seed_of(self.seed, context, k) for context, k in keys]
        groups = wait_for_result(self.objective.sample_thoughts(self.engine, positions, prompts, seeds))
        self.counts.thoughts += len(groups)
        self.counts.tokens += sum(len(group.thoughts[0].token_ids) for group in groups)
        self.counts.unclosed += sum(
            group.thoughts[0].finish_reason is not FinishReason.CLOSE for group in groups
        )
        return [ids_before_answer(group, 0) for group in groups]

    def _position(self, context: tuple[int, ...], after: int) -> Position:
        """The position at the end of a context, which loses its first tokens if the row is too long."""
        whole = Position("", len(context), context, ())
        prompt = self.objective.prompt(whole)
        thought = self.objective.setting.params.max_thought_tokens
        around = len(prompt.token_ids) - len(context) + len(prompt.close_ids) + len(prompt.join_ids)
        room = self._most - around - thought - after
        if len(context) <= room:
            return whole
        if room < 1:
            raise ConfigError(
                f"the model takes {self._most} tokens: thoughts of up to {thought} and answers of up to "
                f"{after} leave none for the context of a task. Allow shorter thoughts: "
                "--max-thought-tokens, or sampling.max_thought_tokens"
            )
        self.counts.cut += 1
        return Position("", room, context[-room:], ())


def _seed_of(seed: int, context: tuple[int, ...], k: int) -> int:
    """The seed of thought `k` in a context."""
    number = zlib.crc32(np.asarray(context, np.int64).tobytes())
    return int(np.random.default_rng((seed, number, k)).integers(2**62))
