"""The interface of every engine: sample thoughts, take new weights, describe itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import nn

from rollout.types import FinishReason, Prompt, SamplingParams, Thought, WeightSource


@dataclass(frozen=True, kw_only=True)
class EngineInfo:
    """What a caller may ask about an engine. The values may change: servers fail and come back."""

    shares_weights: bool = False
    """It reads the trainer's own parameters: at equal versions, behaviour and policy are one network."""
    needs_probe: bool = True
    """Its weights arrive by a path that can fail without an error, so a probe checks each sync."""
    max_model_len: int | None = None
    """Longest prompt plus thought in tokens; None: the limit of the trained model holds."""
    block_size: int | None = None
    """Tokens per block of the prefix cache; None: there is no cache to empty with `reset_prefix_cache`."""
    num_engines: int = 1
    """Engines that prompts are dealt to evenly; a probe samples from each of them."""
    updates_in_flight: bool = False
    """`sync` does not wait for thoughts that are being sampled: their later ids come from the new weights."""
    can_sleep: bool = False
    """`sleep()` gives device memory back while the model trains, `wake()` takes it again before a sync."""
    module: nn.Module | None = field(default=None, repr=False, compare=False)
    """A whole transformers module in this process with the weights of the last sync, for evaluation."""
    timings: Mapping[str, float] = field(default_factory=dict)
    """Seconds of the parts of the last sync, by metric name (`perf/weight_sync_load_s`)."""


class Engine(Protocol):
    """A sampler of thoughts: token ids in, token ids and log-probabilities out.

    A thought is sampled under one `version` of the weights: `sync` drains or aborts what is in flight, unless
    `info.updates_in_flight`.

    Some methods are optional and announced by `info`: `sleep()` and `wake()` by `can_sleep`,
    `reset_prefix_cache()` by `block_size`.
    """

    @property
    def version(self) -> int:
        """The version of the weights that thoughts are sampled from now."""
        ...

    @property
    def info(self) -> EngineInfo:
        """What the engine is and can do."""
        ...

    async def sample(
        self, prompts: Sequence[Prompt], params: SamplingParams, n: int, seeds: Sequence[int]
    ) -> list[list[Thought]]:
        """Draw `n` thoughts for each prompt; `seeds[i]` decides those of prompt i, whatever the batch."""
        ...

    def sync(self, weights: WeightSource, version: int) -> None:
        """Take the policy's weights; thoughts sampled from now on carry `version`."""
        ...

    def health(self) -> dict[str, Any]:
        """Plain facts about the engine (kind, version, device, counters) for logs and `/health`."""
        ...

    def close(self) -> None:
        """Release what the engine holds; a second call does nothing."""
        ...


class SleepingEngine(Engine, Protocol):
    """An engine whose `info.can_sleep` is true."""

    def sleep(self) -> None:
        """Give the device's memory back until `wake`."""
        ...

    def wake(self) -> None:
        """Take the memory again, weights included."""
        ...


class CachingEngine(Engine, Protocol):
    """An engine whose `info.block_size` is set."""

    def reset_prefix_cache(self) -> None:
        """Forget the contexts that were read."""
        ...


def check_request(
    prompts: Sequence[Prompt],
    params: SamplingParams,
    n: int,
    seeds: Sequence[int],
    *,
    vocabulary: float,
    most: float,
    strings: bool,
) -> None:
    """Raise ValueError for a request that cannot be sampled; the message names the prompt and the reason.

    `vocabulary` and `most` are the model's numbers of token ids and of positions (inf if unknown). `strings`
    is true if the engine has a tokenizer, which stop strings need.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    if len(seeds) != len(prompts):
        raise ValueError(f"one seed a prompt: got {len(prompts)} prompts and {len(seeds)} seeds")
    if len(set(params.banned_ids)) >= vocabulary:
        raise ValueError(f"all {vocabulary} ids of the vocabulary are banned: none is left to sample")
    for i, prompt in enumerate(prompts):
        length = len(prompt.token_ids)
        if length == 0:
            raise ValueError(f"prompt {i} is empty: a thought needs at least one token before it")
        if length + params.max_thought_tokens > most:
            raise ValueError(
                f"prompt {i} has {length} tokens, and with {params.max_thought_tokens} of thought that is "
                f"over the model's {most} positions: shorten the context or max_thought_tokens"
            )
        named = (
            ("", prompt.token_ids),
            ("stop ", prompt.stop_ids),
            ("eos ", params.eos_ids),
            ("banned ", params.banned_ids),
        )
        for name, ids in named:
            wrong = [token for token in ids if not 0 <= token < vocabulary]
            if wrong:
                raise ValueError(
                    f"prompt {i}: {name}id {wrong[0]} is outside the model's vocabulary of {vocabulary}"
                )
        if prompt.stop_strings and not strings:
            raise ValueError(f"prompt {i} has stop strings: the engine needs a tokenizer to find them")


def ending(ids: Sequence[int], prompt: Prompt, params: SamplingParams, by_string: bool) -> FinishReason:
    """Why a thought of these ids ended; `by_string`: its text has a stop string. CLOSE wins over EOS."""
    if by_string or (ids and ids[-1] in prompt.stop_ids):
        return FinishReason.CLOSE
    return FinishReason.EOS if ids and ids[-1] in params.eos_ids else FinishReason.LENGTH
