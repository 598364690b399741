"""Puts calls of an engine that blocks its caller into common batches, off the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from rollout.engine import CachingEngine, Engine, EngineInfo
from rollout.types import Prompt, SamplingParams, Thought, WeightSource


@dataclass(eq=False)
class Call:
    """One caller's request that waits for its batch."""

    prompts: Sequence[Prompt]
    params: SamplingParams
    n: int
    seeds: Sequence[int]
    answer: asyncio.Future[list[list[Thought]]]


class BatchedEngine:
    """Collects calls while `engine` computes; the next batch has those with the same parameters and n.

    All calls come from one event loop. A call that is cancelled while it waits is left out; one that is being
    computed is computed to its end.
    """

    def __init__(self, engine: Engine, most: int = 256):
        self.engine, self.most = engine, most
        self._waiting: list[Call] = []
        self._turn = asyncio.Lock()

    @property
    def version(self) -> int:
        """The version of the weights that thoughts are sampled from now."""
        return self.engine.version

    @property
    def info(self) -> EngineInfo:
        """The engine's; it is not put to sleep through this class."""
        return replace(self.engine.info, can_sleep=False)

    async def sample(
        self, prompts: Sequence[Prompt], params: SamplingParams, n: int, seeds: Sequence[int]
    ) -> list[list[Thought]]:
        """Draw `n` thoughts for each prompt; see `Engine.sample`."""
        call = Call(prompts, params, n, seeds, asyncio.get_running_loop().create_future())
        self._waiting.append(call)
        asyncio.ensure_future(self._serve())  # noqa: RUF006 - the answer keeps it
        return await call.answer

    async def _serve(self) -> None:
        async with self._turn:
            calls = self._next()
            if not calls:
                return
            prompts = [p for call in calls for p in call.prompts]
            seeds = [s for call in calls for s in call.seeds]
            params, n = calls[0].params, calls[0].n
            try:
                groups = iter(
                    await asyncio.to_thread(asyncio.run, self.engine.sample(prompts, params, n, seeds))
                )
                for call in calls:
                    answer = [next(groups) for _ in call.prompts]
                    if not call.answer.done():
                        call.answer.set_result(answer)
            except Exception as error:
                for call in calls:
                    if not call.answer.done():
                        call.answer.set_exception(error)

    def _next(self) -> list[Call]:
        """The oldest waiting call and those of its kind, until a batch is full."""
        self._waiting = [call for call in self._waiting if not call.answer.done()]
        if not self._waiting:
            return []
        first, size = self._waiting[0], 0
        chosen: list[Call] = []
        for call in self._waiting:
            rows = len(call.prompts) * call.n
            if (call.params, call.n) == (first.params, first.n) and (not chosen or size + rows <= self.most):
                chosen.append(call)
                size += rows
        self._waiting = [call for call in self._waiting if call not in chosen]
        return chosen

    async def sync(self, weights: WeightSource, version: int) -> None:
        """Take new weights between two batches."""
        async with self._turn:
            await asyncio.to_thread(self.engine.sync, weights, version)

    def reset_prefix_cache(self) -> None:
        """Empty the engine's prefix cache, which `info.block_size` announces."""
        cast(CachingEngine, self.engine).reset_prefix_cache()

    def health(self) -> dict[str, Any]:
        """The engine's."""
        return self.engine.health()

    def close(self) -> None:
        """Close the engine."""
        self.engine.close()
