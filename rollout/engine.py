"""What every engine does: sample thoughts, take new weights, say how it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from rollout.types import FinishReason, Prompt, SamplingParams, Thought, WeightSource


class Engine(Protocol):
    """A sampler of thoughts: token ids in, token ids and log-probabilities out.

    A thought is sampled under one `version`: `sync` drains or aborts what is in flight. `shares_weights` is
    true where the engine reads the trainer's own parameters, so that behaviour and policy are the same
    network as long as versions agree.
    """

    version: int
    shares_weights: bool

    async def sample(
        self, prompts: Sequence[Prompt], params: SamplingParams, n: int, seeds: Sequence[int]
    ) -> list[list[Thought]]:
        """Draw `n` thoughts for each prompt; `seeds[i]` decides those of prompt i, whatever else is in the
        batch.
        """
        ...

    def sync(self, weights: WeightSource, version: int) -> None:
        """Take the policy's weights; thoughts sampled from now on carry `version`."""
        ...

    def health(self) -> dict[str, Any]:
        """Plain facts about the engine (kind, version, device, counters) for logs and `/health`."""
        ...

    def close(self) -> None:
        """Release what the engine holds; calling it twice is harmless."""
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
    """Refuse what cannot be sampled with a ValueError that says which prompt and why.

    `vocabulary` and `most` are the model's number of ids and of positions (inf if unknown); `strings` whether
    the engine has a tokenizer to look for stop strings with.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    if len(seeds) != len(prompts):
        raise ValueError(f"one seed a prompt: got {len(prompts)} prompts and {len(seeds)} seeds")
    for i, prompt in enumerate(prompts):
        length = len(prompt.token_ids)
        if length == 0:
            raise ValueError(f"prompt {i} is empty: a thought needs at least one token before it")
        if length + params.max_thought_tokens > most:
            raise ValueError(
                f"prompt {i} has {length} tokens, and with {params.max_thought_tokens} of thought that is "
                f"over the model's {most} positions: shorten the context or max_thought_tokens"
            )
        for name, ids in (("", prompt.token_ids), ("stop ", prompt.stop_ids), ("eos ", params.eos_ids)):
            wrong = [token for token in ids if not 0 <= token < vocabulary]
            if wrong:
                raise ValueError(
                    f"prompt {i}: {name}id {wrong[0]} is outside the model's vocabulary of {vocabulary}"
                )
        if prompt.stop_strings and not strings:
            raise ValueError(f"prompt {i} has stop strings: the engine needs a tokenizer to find them")


def ending(ids: Sequence[int], prompt: Prompt, params: SamplingParams, by_string: bool) -> FinishReason:
    """Why a thought of these ids ended; `by_string` if a stop string was found in its text. Closing wins
    over end of text.
    """
    if by_string or (ids and ids[-1] in prompt.stop_ids):
        return FinishReason.CLOSE
    return FinishReason.EOS if ids and ids[-1] in params.eos_ids else FinishReason.LENGTH
