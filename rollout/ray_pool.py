"""Engines as Ray actors: one for each machine or device, restarted when they die.

The trainer may run in Ray or outside it. Weights go through Ray's object store, once for all actors. Every
request names the weights it is for: an actor that was restarted, or missed a sync, loads them before it
samples.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from rollout.engine import EngineInfo, check_request
from rollout.ray_actors import place, start_workers, wait_for_workers
from rollout.types import Prompt, SamplingParams, Thought, WeightSource
from rollout.weights import complete, parameters_of

log = logging.getLogger(__name__)
INSTALL = 'pip install "rlpretrain[ray]"'
NAMESPACE = "rlpretrain"


class RayEngine:
    """A pool of `num_engines` engines, each an actor with `resources` (num_cpus, num_gpus, ...).

    Prompts are dealt out evenly. A call fails if its actor dies or does not answer within `request_timeout`
    seconds; another actor is then asked. An actor that hangs is killed, and Ray restarts it. `sample` raises
    TimeoutError `deadline` seconds after calls began to fail, if no actor answered in that time.

    All trainer ranks give the same `name` and share the actors. `lead` is true on rank 0, which hands over
    the weights and ends the actors; `share` gives rank 0's value to all ranks and makes them wait for it.
    `say` is called every ten seconds with what the start waits for.
    """

    shares_weights = False

    def __init__(
        self,
        kind: str,
        settings: Mapping[str, Any],
        *,
        num_engines: int = 1,
        resources: Mapping[str, float] | None = None,
        strategy: str = "PACK",
        address: str | None = None,
        name: str | None = None,
        request_timeout: float = 300.0,
        deadline: float = 600.0,
        version: int = 0,
        lead: bool = True,
        share: Callable[[Any], Any] = lambda value: value,
        say: Callable[[str], None] = log.warning,
    ) -> None:
        cluster, mode = (None, None) if lead else share(None)  # waits until rank 0 has the actors
        if mode:
            os.environ.setdefault("RAY_AUTH_MODE", mode)  # Ray reads it when it is imported
        try:
            import ray
        except ImportError as error:
            raise ImportError(f"engine ray needs Ray: {INSTALL}") from error
        self._ray, self.version, self.lead, self.share = ray, version, lead, share
        self.request_timeout, self.deadline = request_timeout, deadline
        self.counts: Counter[str] = Counter()
        self.timings: dict[str, float] = {}
        self._began = not ray.is_initialized()
        if self._began:
            # without an address Ray would join the cluster of RAY_ADDRESS or of an old `ray start`
            address = cluster or address or "local"
            ray.init(
                address=address,
                include_dashboard=False,
                log_to_driver=False,
                namespace=NAMESPACE,
                num_cpus=max(num_engines + 1, os.cpu_count() or 1) if address == "local" else None,
            )
        self._parameters = parameters_of(
            settings["model"],
            revision=settings.get("revision"),
            trust_remote_code=bool(settings.get("trust_remote_code")),
        )
        names = [f"{name or f'engines-{os.getpid()}-{id(self)}'}-{i}" for i in range(num_engines)]
        if lead:
            resources = dict(resources or {"num_cpus": 1})
            self._group = place(num_engines, resources, strategy, deadline, say)
            self.actors = start_workers(self._group, names, kind, settings, resources, NAMESPACE)
        else:
            self.actors: list[Any] = [ray.get_actor(name, namespace=NAMESPACE) for name in names]
        workers = wait_for_workers(self.actors, deadline, say)
        self.block_size = max(worker.block_size for worker in workers)
        self.max_model_len = min(worker.max_model_len for worker in workers)
        self.num_engines = num_engines
        self._answered = 0.0  # when an actor answered last
        self._weights: list[Any] = []  # a reference to the present ones in the object store
        self._closed = False
        if lead:
            share((ray.get_runtime_context().gcs_address, os.environ.get("RAY_AUTH_MODE")))

    @property
    def info(self) -> EngineInfo:
        """The limits that hold for every actor."""
        return EngineInfo(
            max_model_len=self.max_model_len,
            block_size=self.block_size,
            num_engines=self.num_engines,
            timings=self.timings,
        )

    async def sample(
        self, prompts: Sequence[Prompt], params: SamplingParams, n: int, seeds: Sequence[int]
    ) -> list[list[Thought]]:
        """Draw `n` thoughts for each prompt; see `Engine.sample`. They do not depend on the actor.

        Raises ValueError for what cannot be sampled, TimeoutError if no actor answers.
        """
        if self._closed:
            raise RuntimeError("this engine is closed")
        check_request(
            prompts, params, n, seeds, vocabulary=float("inf"), most=self.max_model_len, strings=True
        )
        size = min(len(prompts), len(self.actors))
        parts = [range(k, len(prompts), len(self.actors)) for k in range(size)]
        calls = [
            self._sample_part(k, [prompts[i] for i in part], params, n, [seeds[i] for i in part])
            for k, part in enumerate(parts)
        ]
        groups: list[list[Thought]] = [[] for _ in prompts]
        for part, answer in zip(parts, await asyncio.gather(*calls), strict=True):
            for i, group in zip(part, answer, strict=True):
                groups[i] = group
        self.counts.update(
            prompts=len(prompts),
            thoughts=n * len(prompts),
            tokens=sum(len(thought.token_ids) for group in groups for thought in group),
        )
        return groups

    async def _sample_part(
        self, first: int, prompts: list[Prompt], params: SamplingParams, n: int, seeds: list[int]
    ) -> list[list[Thought]]:
        """The thoughts of some prompts, from actor `first` or, where it fails, from the next one."""
        errors, failing_since, k = self._ray.exceptions, 0.0, first
        while True:
            actor = self.actors[k % len(self.actors)]
            try:
                call = actor.sample.remote(prompts, params, n, seeds, self._weights, self.version)
                groups, was_behind = await asyncio.wait_for(_answer(call), self.request_timeout)
                self._answered = time.monotonic()
                self.counts["actors_taken_back"] += was_behind
                return groups
            except errors.RayActorError as error:
                reason = repr(error)
                self.counts["actor_deaths"] += 1
            except TimeoutError:
                reason = f"no answer within {self.request_timeout:.0f} s"
                self.counts["actor_hangs"] += 1
                self._ray.kill(actor, no_restart=False)
            self.counts["retries"] += 1
            failing_since = failing_since or time.monotonic()
            if time.monotonic() > max(failing_since, self._answered) + self.deadline:
                raise TimeoutError(f"no engine answered within {self.deadline:.0f} s; the last one: {reason}")
            await asyncio.sleep(0.2)
            k += 1

    def sync(self, weights: WeightSource, version: int) -> None:
        """Put the weights into the object store and let every actor load them.

        An actor that cannot load them now does so before it samples. All ranks call this; rank 0 puts the
        weights. Raises ValueError if parameters are missing.
        """
        if self._closed:
            raise RuntimeError("this engine is closed")
        begin = time.perf_counter()
        state: dict[str, torch.Tensor] = {}
        for name, tensor in weights():  # all ranks iterate, since gathering sharded weights needs all
            if self.lead:
                state[name] = tensor.detach().to("cpu", copy=True)
        self.timings["perf/weight_sync_gather_s"] = time.perf_counter() - begin
        self.version = version
        if self.lead:
            begin = time.perf_counter()
            self._weights = [self._ray.put(complete(state, self._parameters))]
            self.timings["perf/weight_sync_write_s"] = time.perf_counter() - begin
            begin = time.perf_counter()
            answers = self._ask_all("sync", self._weights, version)
            self.counts["missed_syncs"] += answers.count(None)
            self.timings["perf/weight_sync_load_s"] = time.perf_counter() - begin
        self.share(None)
        if not self.lead:  # a reference to stored weights travels through Ray only
            held = [answer[0] for answer in self._ask_all("weights") if answer is not None]
            self._weights = next((reference for reference, its_version in held if its_version == version), [])

    def _ask_all(self, method: str, *arguments: Any) -> list[tuple[Any] | None]:
        """The answer of each actor in a tuple of one; None for an actor that does not answer."""
        errors = self._ray.exceptions
        answers: list[tuple[Any] | None] = []
        for call in [getattr(actor, method).remote(*arguments) for actor in self.actors]:
            try:
                answers.append((self._ray.get(call, timeout=self.request_timeout),))
            except (errors.RayActorError, errors.GetTimeoutError):
                answers.append(None)
        return answers

    def reset_prefix_cache(self) -> None:
        """Empty the prefix cache of every engine."""
        calls = [actor.reset_prefix_cache.remote() for actor in self.actors]
        self._ray.get(calls, timeout=self.request_timeout)

    def health(self) -> dict[str, Any]:
        """Kind, version, number of actors, counters since the start."""
        return {
            "kind": "ray",
            "version": self.version,
            "shares_weights": False,
            "closed": getattr(self, "_closed", True),
            "num_engines": len(self.actors),
            "ray": self._ray.__version__,
            **self.counts,
        }

    def close(self) -> None:
        """End the actors, and Ray if it was started here; a second call does nothing."""
        if self._closed:
            return
        self._closed = True
        self._weights = []
        if self.lead:
            for actor in self.actors:
                self._ray.kill(actor)
            self._ray.util.remove_placement_group(self._group)
        if self._began:
            self._ray.shutdown()


async def _answer(call: Any) -> Any:
    """A call's result; an exception of the engine is raised as itself."""
    try:
        return await call
    except Exception as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, ValueError | RuntimeError):
            raise cause from error
        raise
