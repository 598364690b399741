"""What every engine does: sample thoughts, take new weights, say how it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from rollout.types import Prompt, SamplingParams, Thought, WeightSource


class Engine(Protocol):
    """A sampler of thoughts: token ids in, token ids and log-probabilities out.

    A thought is sampled under one `version`: `sync` drains or aborts what is in flight. `shares_weights` is true where
    the engine reads the trainer's own parameters, so that behaviour and policy are the same network as long as versions
    agree.
    """

    version: int
    shares_weights: bool

    async def sample(
        self, prompts: Sequence[Prompt], params: SamplingParams, n: int, seeds: Sequence[int]
    ) -> list[list[Thought]]:
        """Draw `n` thoughts for each prompt; `seeds[i]` decides those of prompt i, whatever else is in the batch."""
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
