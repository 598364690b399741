"""An engine that samples nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rollout.engine import EngineInfo
from rollout.types import Prompt, SamplingParams, Thought, WeightSource


class IdleEngine:
    """Stands where an engine is expected and no thought is ever sampled; it holds no weights."""

    def __init__(self) -> None:
        self.version = 0
        self.info = EngineInfo(needs_probe=False)

    async def sample(
        self, prompts: Sequence[Prompt], params: SamplingParams, n: int, seeds: Sequence[int]
    ) -> list[list[Thought]]:
        """RuntimeError: there is nothing to sample with."""
        raise RuntimeError("this run has no engine, since its objective has no positions to think at")

    def sync(self, weights: WeightSource, version: int) -> None:
        """Note the version; the weights are not read."""
        self.version = version

    def health(self) -> dict[str, Any]:
        """The kind and the version."""
        return {"kind": "none", "version": self.version}

    def close(self) -> None:
        """Nothing to release."""
