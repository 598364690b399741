"""The client of vLLM servers against a real one: the trainer's log-probs, and faults that lose nothing."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator

import pytest

from rollout import FinishReason, HFEngine, Prompt, SamplingParams
from rollout.probe import Probe, StaleWeights
from tests.builders.sampling import prompts_of, sample, tokens
from tests.builders.servers import Proxy, VLLMServer, free_port

pytest.importorskip("vllm", reason="needs the CPU build of vLLM: make env LOCK=test-cpu")
pytest.importorskip("httpx")
from rollout.servers import Refused  # noqa: E402
from rollout.vllm_routes import VLLMRoutes  # noqa: E402
from rollout.vllm_server import EngineUnavailable, VLLMServerEngine  # noqa: E402
from tests.builders.vllm import VOCABULARY, ask, move, served_model, weights_of, worst  # noqa: E402

pytestmark = pytest.mark.slow
PARAMS = SamplingParams(max_thought_tokens=9)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return served_model(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def server(model, tmp_path_factory) -> Iterator[VLLMServer]:
    server = VLLMServer(model.folder, tmp_path_factory.mktemp("log") / "server.log").start().ready()
    yield server
    server.kill()


@pytest.fixture
def make(model, tmp_path):
    """Engines for given URLs, closed at the end."""
    made = []

    def start(*urls: str, **settings) -> VLLMServerEngine:
        settings = {"request_timeout": 10.0, "deadline": 15.0, "patience": 0.2, "block_size": 32} | settings
        made.append(VLLMServerEngine(urls, model=model.folder, weights_dir=tmp_path / "weights", **settings))
        made[-1].sync(weights_of(model), 0)
        return made[-1]

    yield start
    for engine in made:
        engine.close()


def test_log_probs_are_the_trainers_before_and_after_every_update(make, model, server):
    engine = make(server.url)
    prompts = prompts_of([12, 3, 70, 70, 130])
    assert worst(model, prompts, sample(engine, prompts)) <= 1e-4
    probe = Probe(VOCABULARY, engine.block_size, engine.max_model_len)
    assert probe.covers_cache and ask(probe, model, engine, 0) <= 1e-4
    for version in (1, 2, 3):
        move(model)
        assert worst(model, prompts, sample(engine, prompts)) > 1e-2
        engine.sync(weights_of(model, drop=("lm_head.weight",)), version)  # a tied head is filled in
        groups = sample(engine, prompts)
        assert worst(model, prompts, groups) <= 1e-4 and ask(probe, model, engine, version) <= 1e-4
        assert {t.policy_version for group in groups for t in group} == {version}
    assert [p.name for p in engine.weights_dir.iterdir()] == ["version-3"]
    assert set(engine.timings) == {
        *(f"perf/weight_sync_{part}_s" for part in ("gather", "write", "drain", "load")),
        "perf/weight_sync_mib",
    }


def test_the_probe_finds_what_the_server_keeps(make, model, server, monkeypatch):
    engine = make(server.url)
    probe = Probe(VOCABULARY, engine.block_size, engine.max_model_len)
    ask(probe, model, engine, 0)
    move(model)
    ask_route = VLLMRoutes.ask

    async def forgetful(server, route, **what):
        return (
            None if route in ("/reset_prefix_cache", "/pause") else await ask_route(server, route, **what)
        )  # both empty it

    with monkeypatch.context() as broken:
        broken.setattr(VLLMRoutes, "ask", forgetful)
        engine.sync(weights_of(model), 1)
    with pytest.raises(StaleWeights, match="its prefix cache kept contexts"):
        ask(probe, model, engine, 1)
    move(model)
    with monkeypatch.context() as broken:
        broken.setattr(
            "rollout.server_engine.complete",
            lambda state, names: {n: state[n] for n in state if n[:2] != "lm"},
        )
        engine.sync(weights_of(model), 2)
    with pytest.raises(StaleWeights, match="a tensor did not arrive"):
        ask(probe, model, engine, 2)


def test_groups_are_the_same_whatever_the_concurrency_and_whoever_answers(make, server):
    prompts = prompts_of([12, 3, 20, 9, 33, 5, 8])
    second = Proxy(server.port)
    try:
        alone = sample(make(server.url, concurrency=1), prompts)
        shared = make(server.url, second.url, concurrency=1)
        second.mode = "slow"  # so that hits are counted
        assert tokens(sample(shared, prompts)) == tokens(alone)
        assert second.hit >= 2  # of 7 prompts, dealt out before the first answer came
        again = asyncio.run(shared.sample([prompts[4]], PARAMS, 1, [alone[4][2].seed]))
        assert again[0][0].token_ids == alone[4][2].token_ids
    finally:
        second.close()


def test_greedy_thoughts_agree_with_the_transformers_engine(make, model, server):
    prompts = prompts_of([12, 3, 20, 9, 33], stop_ids=tuple(range(3, 12)))
    greedy = SamplingParams(max_thought_tokens=9, temperature=0.0, eos_ids=tuple(range(20, 30)))
    theirs, ours = (
        sample(make(server.url), prompts, greedy, n=1),
        sample(HFEngine(model), prompts, greedy, n=1),
    )
    assert tokens(theirs) == tokens(ours)
    assert [g[0].finish_reason for g in theirs] == [g[0].finish_reason for g in ours]
    texts = Prompt(prompts[0].token_ids, stop_ids=(), stop_strings=("w1",))
    assert (
        sample(make(server.url), [texts], SamplingParams(max_thought_tokens=200))[0][0].finish_reason
        == FinishReason.CLOSE
    )


def test_banned_ids_are_never_sampled(make, model, server):
    engine, prompts, banned = make(server.url), prompts_of([12, 3], stop_ids=()), tuple(range(0, 40, 2))
    greedy = SamplingParams(max_thought_tokens=9, temperature=0.0, banned_ids=banned)
    theirs, ours = (sample(each, prompts, greedy, n=1) for each in (engine, HFEngine(model)))
    assert tokens(theirs) == tokens(ours) != tokens(sample(engine, prompts, PARAMS, n=1))
    drawn = SamplingParams(max_thought_tokens=9, temperature=2.0, banned_ids=banned)
    assert not any(set(t.token_ids) & set(banned) for g in sample(engine, prompts, drawn, n=8) for t in g)


@pytest.mark.parametrize("fault", ["refuse", "reset", "hang", "slow"])
def test_one_bad_server_of_two_loses_nothing(make, server, fault):
    prompts = prompts_of([12, 3, 20, 9, 33, 5, 8])
    expected = tokens(sample(make(server.url), prompts))
    bad = Proxy(server.port)
    try:
        engine = make(server.url, bad.url, request_timeout=2.0, concurrency=2)
        bad.mode = fault
        begin = time.monotonic()
        assert tokens(sample(engine, prompts)) == expected
        assert time.monotonic() - begin < 8
        health = engine.health()
        if fault == "slow":
            assert "server_failures" not in health and bad.hit
        else:
            assert health["server_failures"] >= 1 and health["servers"][1]["last_error"]
            bad.mode = "pass"
            wait_until(lambda: all(s["alive"] for s in engine.health()["servers"]))
            assert engine.health()["servers_taken_back"] >= 1 and tokens(sample(engine, prompts)) == expected
    finally:
        bad.close()


def wait_until(true, timeout: float = 20.0) -> None:
    end = time.monotonic() + timeout
    while not true():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.1)


def test_a_server_that_was_killed_comes_back_with_the_present_weights(make, model, server):
    """Sampling fails within the deadline; a restarted server has old weights and gets the current ones."""
    engine = make(server.url, deadline=4.0, request_timeout=60.0)  # the first request of a server is slow
    move(model)
    engine.sync(weights_of(model), 1)
    prompts = prompts_of([12, 3, 20])
    expected = tokens(sample(engine, prompts))
    server.kill()
    begin = time.monotonic()
    with pytest.raises(EngineUnavailable, match=f"no vLLM server works, for 4 s .*{server.url}"):
        sample(engine, prompts)
    assert time.monotonic() - begin < 10
    server.start().ready()
    wait_until(lambda: engine.health()["servers"][0]["alive"])
    assert (
        tokens(sample(engine, prompts)) == expected and worst(model, prompts, sample(engine, prompts)) <= 1e-4
    )
    assert engine.health()["servers_taken_back"] == 1


def test_a_sync_waits_for_the_only_server(make, model, server):
    """A sync waits for a killed server, which gets the new weights after its restart."""
    engine = make(server.url, deadline=120.0)
    server.kill()
    move(model)
    syncing = threading.Thread(target=engine.sync, args=(weights_of(model), 1))
    syncing.start()
    syncing.join(1.0)
    assert syncing.is_alive()
    server.start().ready()
    syncing.join(20.0)
    assert not syncing.is_alive() and engine.version == 1
    prompts = prompts_of([12, 3, 20])
    assert worst(model, prompts, sample(engine, prompts)) <= 1e-4
    assert engine.health()["servers_taken_back"] == 1


def test_a_sync_without_any_server_ends(make, model, server):
    bad = Proxy(server.port)
    engine = make(bad.url, deadline=2.0)
    bad.close()
    begin = time.monotonic()
    with pytest.raises(EngineUnavailable, match=f"no vLLM server took the weights of version 1 .*{bad.url}"):
        engine.sync(weights_of(model), 1)
    assert 2 <= time.monotonic() - begin < 10


def test_a_client_that_asks_for_health_can_be_closed(make, server, monkeypatch):
    """Closing cancels a health request that swallows the cancellation; it neither hangs nor raises."""
    bad = Proxy(server.port)
    engine, asked = make(bad.url, server.url), threading.Event()
    healthy = VLLMRoutes.healthy

    async def swallows(server, timeout=None):
        asked.set()
        try:
            return await asyncio.sleep(60)
        except asyncio.CancelledError:
            return await healthy(server, timeout)

    monkeypatch.setattr(VLLMRoutes, "healthy", swallows)
    bad.close()
    sample(engine, prompts_of([12, 3, 20]))
    assert asked.wait(5.0)
    begin = time.monotonic()
    engine.close()
    assert time.monotonic() - begin < 9 and not engine._thread.is_alive()


def test_weights_of_another_run_are_not_taken_for_ones_own(make, model, server, monkeypatch):
    """A resumed run's first sync of version 1 fails: the server's older version 1 must not be used."""
    make(server.url).sync(weights_of(model), 1)
    resumed, load, failed = make(server.url), VLLMRoutes.load_weights, []

    async def breaks_once(server, folder, mark):
        if not failed:
            failed.append(mark)
            raise EngineUnavailable("not now")
        await load(server, folder, mark)

    monkeypatch.setattr(VLLMRoutes, "load_weights", breaks_once)
    move(model)
    resumed.sync(weights_of(model), 1)
    prompts = prompts_of([12, 3, 20])
    assert failed and worst(model, prompts, sample(resumed, prompts)) <= 1e-4


def test_a_run_begins_with_the_servers_there_are(make, model, server, monkeypatch):
    """A run starts without a server that is down and uses it once it answers."""
    monkeypatch.setattr("rollout.server_pool.GRACE", 0.5)
    late = free_port()
    engine = make(f"http://127.0.0.1:{late}", server.url)
    assert [s["alive"] for s in engine.health()["servers"]] == [False, True]
    prompts = prompts_of([12, 3, 20])
    expected = tokens(sample(engine, prompts))
    proxy = Proxy(server.port, late)
    try:
        wait_until(lambda: engine.health()["servers"][0]["alive"])
        assert tokens(sample(engine, prompts)) == expected
    finally:
        proxy.close()


def test_a_restart_that_nobody_saw_is_noticed(make, model, server):
    """A server that restarts between two requests answers with the weights of its checkpoint."""
    engine = make(server.url)
    move(model)
    engine.sync(weights_of(model), 1)
    prompts = prompts_of([12, 3, 20])
    expected = tokens(sample(engine, prompts))
    server.kill()
    server.start().ready()
    assert tokens(sample(engine, prompts)) == expected
    health = engine.health()
    assert health["servers_taken_back"] >= 1 and health["server_failures"] >= 1


def test_what_a_server_refuses_is_the_callers_error(make, server):
    engine = make(server.url)
    with pytest.raises(ValueError, match=r"refused a prompt of 1 tokens: .*out of vocabulary"):
        sample(engine, [Prompt((VOCABULARY + 5,), stop_ids=())])
    with pytest.raises(ValueError, match="over the model's 512 positions"):
        sample(engine, [Prompt((1,) * 510, stop_ids=())])
    assert sample(engine, prompts_of([4]))


def test_a_server_that_is_not_there_or_not_prepared(model, tmp_path, server, monkeypatch):
    settings = {"model": model.folder, "weights_dir": tmp_path, "deadline": 1.0, "patience": 0.2}
    with pytest.raises(EngineUnavailable, match=r"no vLLM server answered within 1 s .*ConnectError"):
        VLLMServerEngine([f"http://127.0.0.1:{free_port()}"], **settings)
    monkeypatch.setattr("rollout.vllm_routes.SUPPORTED", ((0, 1), (0, 2)))
    with pytest.raises(
        EngineUnavailable, match=r"runs vLLM 0\.\d+\.\d+\S*; its routes are known from 0.1 to below 0.2"
    ):
        VLLMServerEngine([server.url], **settings)
    with pytest.raises(ValueError, match="needs the URL of at least one server"):
        VLLMServerEngine([], **settings)


def test_changes_of_weights_are_not_for_vllms_own_server(make, server):
    with pytest.raises(Refused, match="set engine.transfer to file, or use `rlpretrain serve`"):
        make(server.url, transfer="changes")


def test_a_table_of_another_size_is_refused_before_any_weights_travel(make, server):
    """Issue 15.22: vLLM cannot load weights of another shape, so the client refuses it at once."""
    assert sample(make(server.url, vocabulary=VOCABULARY), prompts_of([4]))
    for size, word in ((VOCABULARY + 2, "fewer"), (VOCABULARY - 1, "more")):
        with pytest.raises(Refused, match=f"of {word} than {size} tokens.*rlpretrain tag MODEL --out DIR"):
            make(server.url, vocabulary=size)


def test_weights_that_a_healthy_server_cannot_load_are_not_tried_until_the_deadline(
    make, model, server, monkeypatch
):
    """Issue 15.22: the folder is not where the server looks.

    This test stands last because the server's weights are undefined afterwards.
    """
    engine = make(server.url, deadline=120.0)
    monkeypatch.setattr("rollout.handover.write_weights", lambda folder, state: None)
    begin = time.monotonic()
    with pytest.raises(
        EngineUnavailable, match="no vLLM server took the weights of version 1 .*collective_rpc answered"
    ):
        engine.sync(weights_of(model), 1)
    assert time.monotonic() - begin < 60
