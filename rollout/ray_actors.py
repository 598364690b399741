"""Placing and starting the Ray actors of a pool, and waiting for them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rollout.ray_worker import Worker, WorkerInfo
from rollout.waiting import EVERY


def place(
    number: int, resources: Mapping[str, float], strategy: str, deadline: float, say: Callable[[str], None]
) -> Any:
    """A placement group with room for `number` actors of `resources` each.

    `say` is called every ten seconds of waiting. Raises TimeoutError after `deadline` seconds.
    """
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    group = placement_group([_bundle(resources)] * number, strategy=strategy)
    needed = f"{number} engines with {dict(resources)} each"
    end, ready = time.monotonic() + deadline, group.ready()
    while True:
        # group.wait would take whole seconds only
        placed, _ = ray.wait([ready], timeout=max(0.0, min(EVERY, end - time.monotonic())))
        if placed:
            return group
        left = end - time.monotonic()
        if left <= 0:
            remove_placement_group(group)
            raise TimeoutError(f"Ray has no room for {needed}: {ray.available_resources()}")
        say(
            f"waiting for Ray to place {needed}, {left:.0f} s more (engine.deadline); it has "
            f"{ray.available_resources()}"
        )


def start_workers(
    group: Any,
    names: Sequence[str],
    kind: str,
    settings: Mapping[str, Any],
    resources: Mapping[str, float],
    namespace: str,
) -> list[Any]:
    """A named actor in each bundle of a placement group."""
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy as InGroup

    environment = {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "TOKENIZERS_PARALLELISM": "false",
    }
    concurrency = 256 if kind == "vllm_local" else 1  # vLLM decodes the calls of several ranks together
    remote: Any = ray.remote
    actor = remote(max_restarts=-1, max_task_retries=0, max_concurrency=concurrency)(Worker)
    return [
        actor.options(
            name=name, namespace=namespace, scheduling_strategy=InGroup(group, i), **resources
        ).remote(kind, dict(settings), environment)
        for i, name in enumerate(names)
    ]


def wait_for_workers(actors: Sequence[Any], deadline: float, say: Callable[[str], None]) -> list[WorkerInfo]:
    """What each actor says of its engine, once all have loaded their model.

    `say` is called every ten seconds of waiting. Raises Ray's GetTimeoutError after `deadline` seconds.
    """
    import ray

    calls = [actor.info.remote() for actor in actors]
    end = time.monotonic() + deadline
    while True:
        patience = max(0.0, min(EVERY, end - time.monotonic()))
        _, loading = ray.wait(calls, num_returns=len(calls), timeout=patience)
        left = end - time.monotonic()
        if not loading or left <= 0:
            return ray.get(calls, timeout=0)
        say(
            f"waiting for {len(loading)} of {len(calls)} Ray actors to load their model, {left:.0f} s more "
            "(engine.deadline)"
        )


def _bundle(resources: Mapping[str, float]) -> dict[str, float]:
    """An actor's resources by the names that they have in a placement group."""
    known = {"num_cpus": "CPU", "num_gpus": "GPU"}
    return {known[name]: amount for name, amount in resources.items() if name in known}
