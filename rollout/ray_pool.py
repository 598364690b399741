"""Engines as Ray actors: as many as there are machines or devices for, started again when they die.

The trainer may live in Ray or outside it. Weights go through Ray's object store, once for all actors. Every
request names the weights it is for: an actor that was started again, or missed a sync, loads them before it
samples.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rollout.engine import check_request
from rollout.types import Prompt, SamplingParams, Thought, WeightSource
from rollout.weights import complete, parameters_of

INSTALL = 'pip install "rlpretrain[ray]"'
NAMESPACE = "rlpretrain"


class Worker:
    """What runs in an actor: one engine. `kind` is hf or vllm_local, `settings` its arguments (`model` a
    hub id or folder).
    """

    def __init__(self, kind: str, settings: Mapping[str, Any], environment: Mapping[str, str]):
        os.environ.update(environment)
        self.engine: Any
        self.held: list[Any] = []  # a reference to the weights it has
        self.lock = threading.Lock()
        if kind == "hf":
            import torch
            from transformers import AutoModelForCausalLM, AutoTokenizer

            from rollout.hf import HFEngine

            where = {k: v for k, v in settings.items() if k in ("revision", "trust_remote_code")}
            form = {k: v for k, v in settings.items() if k in ("dtype", "attn_implementation")}
            device = "cuda" if torch.cuda.is_available() else "cpu"
            model = AutoModelForCausalLM.from_pretrained(
                settings["model"], **{"dtype": "float32"} | form | where
            )
            rest = {k: v for k, v in settings.items() if k in ("batch_size",)}
            tokenizer = (
                AutoTokenizer.from_pretrained(settings["tokenizer"], **where)
                if settings.get("tokenizer")
                else None
            )
            self.engine = HFEngine(model.eval().to(device), tokenizer=tokenizer, shares_weights=False, **rest)
            self.facts = {
                "block_size": 1,
                "max_model_len": getattr(model.config, "max_position_embeddings", 1 << 20),
            }
            self.engine.version = -1
        else:
            from rollout.vllm_local import VLLMEngine

            self.engine = VLLMEngine(**settings, version=-1)
            self.facts = {"block_size": self.engine.block_size, "max_model_len": self.engine.max_model_len}

    def about(self) -> dict[str, Any]:
        return {**self.facts, "pid": os.getpid(), "node": os.uname().nodename}

    def sample(
        self,
        prompts: list[Prompt],
        params: SamplingParams,
        n: int,
        seeds: list[int],
        weights: list[Any],
        version: int,
    ) -> tuple[list[list[Thought]], bool]:
        """The thoughts, and whether weights had to be loaded first. Newer ones than asked for are fine:
        thoughts say theirs.
        """
        with self.lock:
            if late := self.engine.version < version:
                self._load(weights, version)
        return asyncio.run(self.engine.sample(prompts, params, n, seeds)), late

    def sync(self, weights: list[Any], version: int) -> None:
        with self.lock:
            self._load(weights, version)

    def _load(self, weights: list[Any], version: int) -> None:
        import ray

        if not weights:
            raise RuntimeError("this pool was given no weights yet: call sync first")
        own = {
            name: tensor.clone() for name, tensor in ray.get(weights[0]).items()
        }  # the object store's are read-only
        self.engine.sync(lambda: own.items(), version)
        self.held = weights

    def weights(self) -> tuple[list[Any], int]:
        return self.held, self.engine.version

    def reset_prefix_cache(self) -> None:
        if hasattr(self.engine, "reset_prefix_cache"):
            self.engine.reset_prefix_cache()

    def health(self) -> dict[str, Any]:
        return self.engine.health()


class RayEngine:
    """A pool of `num_engines` engines, each an actor with `resources` (num_cpus, num_gpus, ...) of a
    placement group.

    Prompts are dealt out evenly. A call that fails, because its actor died or does not answer within
    `request_timeout` seconds, is made again on another one; an actor that hangs is killed, and Ray starts it
    anew. `deadline` seconds after calls began to fail, if none was answered since, `sample` raises
    TimeoutError. On several trainer ranks all give the same `name` and share the actors; `lead` hands over
    the weights and ends the actors, `share` gives all its value, and lets the others wait.
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
    ) -> None:
        where, mode = (None, None) if lead else share(None)  # waits until rank 0 has the actors
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
            address = (
                where or address or "local"
            )  # None would join what RAY_ADDRESS or `ray start` left behind
            ray.init(
                address=address,
                include_dashboard=False,
                log_to_driver=False,
                namespace=NAMESPACE,
                **({"num_cpus": max(num_engines + 1, os.cpu_count() or 1)} if address == "local" else {}),
            )
        self._parameters = parameters_of(
            settings["model"],
            revision=settings.get("revision"),
            trust_remote_code=bool(settings.get("trust_remote_code")),
        )
        names = [f"{name or f'engines-{os.getpid()}-{id(self)}'}-{i}" for i in range(num_engines)]
        if lead:
            self.actors = self._start(names, kind, settings, dict(resources or {"num_cpus": 1}), strategy)
        else:
            self.actors = [ray.get_actor(name, namespace=NAMESPACE) for name in names]
        facts = ray.get([a.about.remote() for a in self.actors], timeout=deadline)
        self.block_size = max(f["block_size"] for f in facts)
        self.max_model_len = min(f["max_model_len"] for f in facts)
        self.num_engines = num_engines
        self._answered = 0.0  # when an actor answered last
        self._weights: list[Any] = []  # a reference to the present ones in the object store
        self._closed = False
        if lead:
            share((ray.get_runtime_context().gcs_address, os.environ.get("RAY_AUTH_MODE")))

    def _start(
        self,
        names: Sequence[str],
        kind: str,
        settings: Mapping[str, Any],
        resources: dict[str, float],
        strategy: str,
    ) -> list[Any]:
        """The actors, in a placement group."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy as InGroup

        ray = self._ray
        self._group = ray.util.placement_group([_bundle(resources)] * len(names), strategy=strategy)
        if not self._group.wait(self.deadline):
            ray.util.remove_placement_group(self._group)
            raise TimeoutError(
                f"Ray has no room for {len(names)} engines with {resources} each: {ray.available_resources()}"
            )
        environment = {
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
            "TOKENIZERS_PARALLELISM": "false",
        }
        at_once = 256 if kind == "vllm_local" else 1  # calls of several ranks are decoded together
        actor = ray.remote(max_restarts=-1, max_task_retries=0, max_concurrency=at_once)(Worker)
        return [
            actor.options(
                name=name, namespace=NAMESPACE, scheduling_strategy=InGroup(self._group, i), **resources
            ).remote(kind, dict(settings), environment)
            for i, name in enumerate(names)
        ]

    async def sample(
        self, prompts: Sequence[Prompt], params: SamplingParams, n: int, seeds: Sequence[int]
    ) -> list[list[Thought]]:
        """Draw `n` thoughts for each prompt; see `Engine.sample`. Which actor draws them does not matter.

        Raises ValueError for what cannot be sampled, TimeoutError when nothing answers.
        """
        if self._closed:
            raise RuntimeError("this engine is closed")
        check_request(
            prompts, params, n, seeds, vocabulary=float("inf"), most=self.max_model_len, strings=True
        )
        parts = [range(i, len(prompts), len(self.actors)) for i in range(min(len(prompts), len(self.actors)))]
        answers = await asyncio.gather(
            *(
                self._part(k, [prompts[i] for i in part], params, n, [seeds[i] for i in part])
                for k, part in enumerate(parts)
            )
        )
        found = {
            i: group
            for part, answer in zip(parts, answers, strict=True)
            for i, group in zip(part, answer, strict=True)
        }
        self.counts.update(
            prompts=len(prompts),
            thoughts=n * len(prompts),
            tokens=sum(len(t.token_ids) for group in found.values() for t in group),
        )
        return [found[i] for i in range(len(prompts))]

    async def _part(
        self, first: int, prompts: list[Prompt], params: SamplingParams, n: int, seeds: list[int]
    ) -> list[list[Thought]]:
        errors, failing, k = self._ray.exceptions, 0.0, first
        while True:
            actor = self.actors[k % len(self.actors)]
            try:
                call = actor.sample.remote(prompts, params, n, seeds, self._weights, self.version)
                found, late = await asyncio.wait_for(_answer(call), self.request_timeout)
                self._answered = time.monotonic()
                self.counts["actors_taken_back"] += late
                return found
            except errors.RayActorError as error:
                why = repr(error)
                self.counts["actor_deaths"] += 1
            except TimeoutError:
                why = f"no answer within {self.request_timeout:.0f} s"
                self.counts["actor_hangs"] += 1
                self._ray.kill(actor, no_restart=False)
            self.counts["retries"] += 1
            failing = failing or time.monotonic()
            if time.monotonic() > max(failing, self._answered) + self.deadline:
                raise TimeoutError(f"no engine answered within {self.deadline:.0f} s; the last one: {why}")
            await asyncio.sleep(0.2)
            k += 1

    def sync(self, weights: WeightSource, version: int) -> None:
        """Put the weights into the object store and let every actor load them; one that cannot now gets them
        before it samples.

        On several ranks all call it, the first one puts. Raises ValueError if parameters are missing.
        """
        if self._closed:
            raise RuntimeError("this engine is closed")
        begin = time.perf_counter()
        state = {
            name: tensor.detach().to("cpu", copy=True) if self.lead else None for name, tensor in weights()
        }
        self.timings["perf/weight_sync_gather_s"] = time.perf_counter() - begin
        self.version = version
        if self.lead:
            begin = time.perf_counter()
            self._weights = [self._ray.put(complete(state, self._parameters))]  # type: ignore[arg-type]
            self.timings["perf/weight_sync_write_s"] = time.perf_counter() - begin
            begin = time.perf_counter()
            self.counts["missed_syncs"] += self._all("sync", self._weights, version).count(None)
            self.timings["perf/weight_sync_load_s"] = time.perf_counter() - begin
        self.share(None)
        if not self.lead:  # a reference travels through Ray only
            self._weights = next((a[0][0] for a in self._all("weights") if a and a[0][1] == version), [])

    def _all(self, method: str, *given: Any) -> list[Any]:
        """What each actor answers, in a list of one; None for one that does not."""
        answers: list[Any] = []
        for call in [getattr(actor, method).remote(*given) for actor in self.actors]:
            try:
                answers.append([self._ray.get(call, timeout=self.request_timeout)])
            except (self._ray.exceptions.RayActorError, self._ray.exceptions.GetTimeoutError):
                answers.append(None)
        return answers

    def reset_prefix_cache(self) -> None:
        """Let every engine forget the contexts it read."""
        self._ray.get(
            [actor.reset_prefix_cache.remote() for actor in self.actors], timeout=self.request_timeout
        )

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
        """End the actors, and Ray if it was started here; calling it twice is harmless."""
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
    """A call's result; what the engine raised comes as itself."""
    try:
        return await call
    except Exception as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, ValueError | RuntimeError):
            raise cause from error
        raise


def _bundle(resources: Mapping[str, float]) -> dict[str, float]:
    """Ray's names for an actor's resources in a placement group."""
    known = {"num_cpus": "CPU", "num_gpus": "GPU"}
    return {known.get(name, name): amount for name, amount in resources.items() if name in known}
