"""Engines as actors of a real local Ray: actors that die or hang, and the weights that a new one gets."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rollout import HFEngine, Prompt, SamplingParams
from rollout.probe import Probe, StaleWeights
from tests.builders.sampling import prompts_of, sample, tokens
from tests.builders.tiny import tiny_model
from tests.builders.vllm import SHAPE, VOCABULARY, ask, move, weights_of, worst

pytest.importorskip("ray", reason="needs Ray: make env LOCK=test-cpu")
from rollout.ray_pool import RayEngine  # noqa: E402

pytestmark = pytest.mark.slow
PARAMS = SamplingParams(max_thought_tokens=9)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    import ray

    ray.init(num_cpus=3, include_dashboard=False, object_store_memory=100 << 20, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    model = tiny_model("qwen3", VOCABULARY, **SHAPE, tie_word_embeddings=True)
    model.folder = Path(tmp_path_factory.mktemp("pool"))
    model.save_pretrained(model.folder)
    return model


def started(model, kind: str = "hf", num_engines: int = 2, **settings) -> RayEngine:
    pool = RayEngine(
        kind,
        {"model": str(model.folder), **settings},
        num_engines=num_engines,
        request_timeout=60.0,
        deadline=90.0,
    )
    pool.sync(weights_of(model), 0)
    return pool


@pytest.fixture(scope="module")
def actors(model, cluster) -> Iterator[RayEngine]:
    """Two actors with the transformers engine, shared by this file because each takes seconds to start."""
    pool = started(model)
    yield pool
    pool.close()
    pool.close()


@pytest.fixture
def pool(actors, model) -> RayEngine:
    """The shared actors with version 0 of the weights and all counts at zero."""
    end = time.monotonic() + 90
    while None in actors._ask_all("info"):  # one that a test has killed is still starting
        assert time.monotonic() < end, "an actor did not start again"
        time.sleep(0.2)
    actors.sync(weights_of(model), 0)
    actors.counts.clear()
    return actors


def test_a_pool_samples_what_one_engine_would(pool, model):
    prompts = prompts_of([12, 3, 20, 9, 33])
    assert tokens(sample(pool, prompts)) == tokens(sample(HFEngine(model), prompts))
    move(model)
    assert worst(model, prompts, sample(pool, prompts)) > 1e-2
    pool.sync(weights_of(model, drop=("lm_head.weight",)), 1)
    assert tokens(sample(pool, prompts)) == tokens(sample(HFEngine(model), prompts))
    assert worst(model, prompts, sample(pool, prompts)) <= 1e-4
    assert set(pool.timings) == {f"perf/weight_sync_{part}_s" for part in ("gather", "write", "load")}
    with pytest.raises(ValueError, match="id 99 is outside the model's vocabulary of 40"):
        sample(pool, [Prompt((99,), stop_ids=())])


def test_banned_ids_reach_the_actors(pool):
    banned = tuple(range(0, VOCABULARY, 2))
    params = SamplingParams(max_thought_tokens=9, banned_ids=banned)
    groups = sample(pool, prompts_of([12, 3], stop_ids=()), params)
    assert not any(set(t.token_ids) & set(banned) for group in groups for t in group)


def test_an_actor_that_is_killed_comes_back_with_the_present_weights(pool, model):
    import ray

    move(model)
    pool.sync(weights_of(model), 1)
    prompts = prompts_of([12, 3, 20, 9])
    expected = tokens(sample(pool, prompts))
    for actor in pool.actors:  # both, so that no one is left who had the weights
        os.kill(ray.get(actor.info.remote()).pid, signal.SIGKILL)
    groups = sample(pool, prompts)
    assert tokens(groups) == expected and worst(model, prompts, groups) <= 1e-4
    health = pool.health()
    assert health["actor_deaths"] >= 1 and health["actors_taken_back"] >= 1


def test_an_actor_that_hangs_is_replaced(pool, model, monkeypatch):
    import ray

    monkeypatch.setattr(pool, "request_timeout", 8.0)
    prompts = prompts_of([12, 3, 20, 9])
    expected = tokens(sample(pool, prompts))
    os.kill(ray.get(pool.actors[1].info.remote()).pid, signal.SIGSTOP)
    begin = time.monotonic()
    assert tokens(sample(pool, prompts)) == expected
    assert time.monotonic() - begin < 40 and pool.health()["actor_hangs"] >= 1


def test_the_probe_finds_one_stale_actor_of_several(pool, model):
    import ray

    probe, old = Probe(VOCABULARY, pool.block_size, pool.max_model_len), dict(weights_of(model)())
    stale = ray.put({name: tensor.detach().clone() for name, tensor in old.items()})
    move(model)
    pool.sync(weights_of(model), 1)
    assert ask(probe, model, pool, 1) <= 1e-4
    ray.get(pool.actors[1].sync.remote([stale], 1))
    with pytest.raises(StaleWeights, match="1 of 2 engines"):
        ask(probe, model, pool, 1)


def test_an_actor_that_missed_a_sync_loads_the_weights_before_it_samples(pool, model):
    import ray

    move(model)
    pool.sync(weights_of(model), 1)
    prompts = prompts_of([12, 3, 20, 9])
    expected = tokens(sample(pool, prompts))
    ray.get(pool.actors[0].__ray_call__.remote(lambda worker: setattr(worker.engine, "version", 0)))
    assert tokens(sample(pool, prompts)) == expected and pool.health()["actors_taken_back"] == 1
    other = RayEngine.__new__(RayEngine)  # what a rank knows that is not the first
    other.__dict__ |= pool.__dict__ | {"lead": False, "_weights": []}
    other.sync(weights_of(model), 1)
    ray.get(pool.actors[0].__ray_call__.remote(lambda worker: setattr(worker.engine, "version", 0)))
    assert tokens(sample(other, prompts)) == expected


@pytest.fixture
def vllm_pool(model, cluster) -> Iterator[RayEngine]:
    pool = started(model, "vllm_local", 1, max_model_len=512, max_num_seqs=32, kv_cache_gib=0.05)
    yield pool
    pool.close()


def test_vllm_in_actors(vllm_pool, model):
    pool = vllm_pool
    probe = Probe(VOCABULARY, pool.block_size, pool.max_model_len)
    assert ask(probe, model, pool, 0) <= 1e-4
    for version in (1, 2):
        move(model)
        pool.sync(weights_of(model), version)
        assert ask(probe, model, pool, version) <= 1e-4
    prompts = prompts_of([12, 70])
    assert worst(model, prompts, sample(pool, prompts)) <= 1e-4

    async def two_ranks():
        return await asyncio.gather(*(pool.sample(prompts, PARAMS, 2, [i, i]) for i in range(2)))

    for groups in asyncio.run(two_ranks()):  # decoded together
        assert worst(model, prompts, groups) <= 1e-4


def test_no_room_is_said(model, cluster, monkeypatch):
    monkeypatch.setattr("rollout.ray_actors.EVERY", 0.8)
    lines: list[str] = []
    with pytest.raises(TimeoutError, match=r"Ray has no room for 1 engines with \{'num_cpus': 99\} each"):
        RayEngine(
            "hf", {"model": str(model.folder)}, resources={"num_cpus": 99}, deadline=6.0, say=lines.append
        )
    assert 1 <= len(lines) <= 8  # one every .8 s of waiting
    assert re.match(
        r"waiting for Ray to place 1 engines with \{'num_cpus': 99\} each, \d s more \(engine.deadline\)",
        lines[0],
    )


def test_actors_that_load_are_said(model, cluster, monkeypatch):
    monkeypatch.setattr("rollout.ray_actors.EVERY", 0.2)
    lines: list[str] = []
    settings = {"model": str(model.folder), "batch_size": 16}
    engine = RayEngine("hf", settings, num_engines=1, deadline=90.0, say=lines.append)
    engine.close()
    assert any(line.startswith("waiting for 1 of 1 Ray actors to load their model") for line in lines)


def test_a_closed_pool_says_so(pool):
    """This test stands last because it ends the shared actors."""
    pool.close()
    with pytest.raises(RuntimeError, match="this engine is closed"):
        asyncio.run(pool.sample(prompts_of([4]), PARAMS, 1, [0]))
