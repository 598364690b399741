"""The state behind the routes of the rollout service: the engine, the pause gate and the counters."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import prometheus_client as prometheus
from fastapi import HTTPException, Request

from rollout.engine import check_request
from rollout.received import Received
from rollout.types import FinishReason, Prompt, SamplingParams, Thought, WeightSource
from rollout.weights import Parameter
from rollout.wire import Limits

NOT_HERE = "this service was started without a folder for weights (--weights-dir)"


@dataclass(frozen=True)
class Served:
    """An engine and the facts of its model; its `sample` must not block the event loop."""

    engine: Any
    name: str
    max_model_len: int
    vocabulary: float = math.inf
    parameters: Sequence[Parameter] = ()  # names and shapes that new weights must have
    tokenizer: Any = None
    eos_ids: tuple[int, ...] = ()
    version: str = "unknown"  # of this library


class Service:
    """The state behind the routes: the engine, the gate that `/pause` closes, and the counters."""

    def __init__(self, served: Served, limits: Limits, weights_dir: Path | None):
        self.served, self.limits = served, limits
        self.engine = served.engine
        self.weights_dir = weights_dir.resolve() if weights_dir else None
        self.received = Received(served.parameters)
        self.mark: str | None = None  # the trainer's name for the present weights
        self.open = asyncio.Event()
        self.open.set()
        self.changing = asyncio.Lock()
        self.running: set[asyncio.Task[Any]] = set()
        self.registry = prometheus.CollectorRegistry()
        make: Any = {"registry": self.registry, "namespace": "rlpretrain"}
        self.requests = prometheus.Counter(
            "requests", "Answers by route and status", ["route", "status"], **make
        )
        self.seconds = prometheus.Histogram(
            "request_seconds",
            "Time of sampling requests",
            ["route"],
            **make,
            buckets=(0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600),
        )
        self.prompt_tokens = prometheus.Counter("prompt_tokens", "Prompt tokens read", **make)
        self.thoughts = prometheus.Counter(
            "thoughts", "Thoughts sampled, by how they ended", ["finish_reason"], **make
        )
        self.tokens = prometheus.Counter("thought_tokens", "Thought tokens sampled", **make)
        self.syncs = prometheus.Counter("weight_syncs", "Weights loaded", **make)
        self.sync_seconds = prometheus.Histogram(
            "weight_sync_seconds", "Time to load weights, draining included", **make
        )
        in_flight = prometheus.Gauge("requests_in_flight", "Sampling requests being answered", **make)
        in_flight.set_function(lambda: len(self.running))
        version = prometheus.Gauge("policy_version", "Version of the weights", **make)
        version.set_function(lambda: self.engine.version)

    async def sample(
        self,
        request: Request,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        n: int,
        seeds: Sequence[int],
    ) -> list[list[Thought]]:
        """Check the request, wait until the service is not paused, and sample.

        Sampling is cancelled when the client disconnects or the time limit is over. Raises HTTPException.
        """
        self._check_limits(len(prompts), n)
        try:
            check_request(
                prompts,
                params,
                n,
                seeds,
                vocabulary=self.served.vocabulary,
                most=self.served.max_model_len,
                strings=self.served.tokenizer is not None,
            )
        except ValueError as error:
            raise HTTPException(400, str(error)) from None
        begin = time.perf_counter()
        groups = await self._while_there(request, self._sample(prompts, params, n, seeds))
        if groups is None:  # the service was paused
            groups = [
                [Thought((), (), FinishReason.ABORT, self.engine.version, seed + k) for k in range(n)]
                for seed in seeds
            ]
        self.seconds.labels(request.url.path).observe(time.perf_counter() - begin)
        self.prompt_tokens.inc(sum(len(p.token_ids) for p in prompts))
        for thought in (t for group in groups for t in group):
            self.thoughts.labels(str(thought.finish_reason)).inc()
            self.tokens.inc(len(thought.token_ids))
        return groups

    def _check_limits(self, prompts: int, n: int) -> None:
        """Raise a 400 for a request above one of the limits."""
        sizes = {"prompts": prompts, "n": n, "prompts x n": prompts * n}
        limits = {"prompts": self.limits.prompts, "n": self.limits.n, "prompts x n": self.limits.thoughts}
        for name, size in sizes.items():
            if size > limits[name]:
                raise HTTPException(400, f"{name} is {size}, and the limit is {limits[name]}")

    async def _sample(
        self, prompts: Sequence[Prompt], params: SamplingParams, n: int, seeds: Sequence[int]
    ) -> list[list[Thought]]:
        while not self.open.is_set():  # it may close again between waking and running
            await self.open.wait()
        task = asyncio.ensure_future(self.engine.sample(prompts, params, n, seeds))
        self.running.add(task)
        try:
            return await task
        finally:
            self.running.discard(task)

    async def _while_there(self, request: Request, work: Coroutine[Any, Any, Any]) -> Any:
        """The result of `work` while the client is connected; None if it was aborted."""
        task = asyncio.ensure_future(work)
        gone = asyncio.ensure_future(_wait_for_disconnect(request))
        try:
            await asyncio.wait(
                (task, gone), timeout=self.limits.request_s, return_when=asyncio.FIRST_COMPLETED
            )
            if task.done():
                return None if task.cancelled() else task.result()
            if gone.done():
                raise HTTPException(499, "the client went away")
            raise HTTPException(504, f"no thoughts within {self.limits.request_s:g} s")
        finally:
            task.cancel()
            gone.cancel()

    async def pause(self, abort: bool) -> None:
        """Start nothing more; abort the requests that run, or wait for them."""
        self.open.clear()
        while self.running:
            for task in tuple(self.running) if abort else ():
                task.cancel()
            await asyncio.wait(set(self.running), timeout=1.0)

    async def reload(self, path: str) -> None:
        """Load weights from a path under the weights folder; HTTPException for any other path."""
        source = self._resolve(path)
        begin = time.perf_counter()
        async with self.changing:
            try:
                state = await asyncio.to_thread(self.received.read, source, self.mark)
                self.mark = None
                await self._sync(lambda: state.items(), self.engine.version + 1)
            except ValueError as error:
                raise HTTPException(400, str(error)) from None
        self.syncs.inc()
        self.sync_seconds.observe(time.perf_counter() - begin)

    def _resolve(self, given: str) -> Path:
        """The path under the weights folder; links that lead out of it are refused."""
        if self.weights_dir is None:
            raise HTTPException(403, NOT_HERE)
        try:
            path = (self.weights_dir / given).resolve(strict=True)
            files = [path, *(file.resolve() for file in path.glob("*.safetensors"))]
        except (OSError, ValueError, RuntimeError):
            files = []
        if not files or not all(file.is_relative_to(self.weights_dir) for file in files):
            raise HTTPException(
                403, "weights_path is not in the folder for weights that this service was started with"
            )
        return files[0]

    async def _sync(self, weights: WeightSource, version: int) -> None:
        """Call the engine's `sync`, which is a coroutine or blocks."""
        if asyncio.iscoroutinefunction(self.engine.sync):
            await self.engine.sync(weights, version)
        else:
            await asyncio.to_thread(self.engine.sync, weights, version)

    async def reset_prefix_cache(self) -> None:
        """Empty the engine's prefix cache, if it has one."""
        if self.engine.info.block_size is not None:
            await asyncio.to_thread(self.engine.reset_prefix_cache)

    def health(self) -> dict[str, Any]:
        """The engine's health, and whether the service is paused."""
        return self.engine.health() | {"paused": not self.open.is_set(), "in_flight": len(self.running)}


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
