"""`rlpretrain serve`: a real one with vLLM under load and bad input, and its routes in this process."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlpretrain.cli import main
from rollout import FinishReason, HFEngine, Prompt, SamplingParams, vllm_routes
from rollout.batched import BatchedEngine
from tests.builders.sampling import prompts_of, sample, tokens
from tests.builders.tiny import tiny_model, word_tokenizer

pytest.importorskip("fastapi", reason="needs fastapi: make env LOCK=test-cpu")
import httpx  # noqa: E402
from fastapi.testclient import TestClient  # noqa: E402

from benchmarks.bad_input import TOKEN, VOCABULARY, cases, rollout  # noqa: E402
from rollout.service import Served, create_app  # noqa: E402
from rollout.vllm_server import VLLMServerEngine  # noqa: E402
from rollout.weights import write_weights  # noqa: E402
from rollout.wire import Limits  # noqa: E402
from tests.builders.serving import Serving  # noqa: E402

PARAMS = SamplingParams(max_thought_tokens=9)
pytestmark = pytest.mark.slow


# a real one, with vLLM


@pytest.fixture(scope="module")
def serving(tmp_path_factory) -> Iterator[Serving]:
    pytest.importorskip("vllm", reason="needs the CPU build of vLLM: make env LOCK=test-cpu")
    service = Serving(tmp_path_factory.mktemp("serving"), "vllm")
    yield service
    service.close()


@pytest.fixture
def trainer(serving):
    """The client that a trainer uses, and the model it trains."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(serving.model).eval()
    engine = VLLMServerEngine(
        [serving.url], model=serving.model, weights_dir=serving.weights / "run", token=TOKEN, deadline=30.0
    )
    yield model, engine
    engine.close()


def test_bad_input_gets_a_clear_answer_and_changes_nothing(serving):
    before = serving.greedy()
    for case in cases(serving.weights, serving.model, serving.secret):
        answer = serving.send(case)
        assert answer.status_code == case.status, f"{case.name}: {answer.text}"
        assert answer.json()["error"]["message"] and "secret-of-this-machine" not in answer.text, case.name
        assert len(answer.text) < 500, case.name
    assert not (serving.weights / "unpickled").exists()
    assert serving.greedy() == before and serving.process.poll() is None


def test_five_hundred_clients_at_once(serving):
    before = serving.greedy()
    memory = serving.memory()
    statuses = asyncio.run(serving.crowd(500))
    assert set(statuses) <= {200, 429} and statuses[200] >= 256 and sum(statuses.values()) == 1000
    assert serving.memory() - memory < 300 << 20
    assert serving.greedy() == before and serving.client.get("/health").json()["in_flight"] == 0


def test_a_trainer_samples_from_it_and_gives_it_weights(serving, trainer):
    from tests.builders.vllm import move, weights_of, worst

    model, engine = trainer
    prompts = prompts_of([12, 3, 70, 130])
    assert worst(model, prompts, sample(engine, prompts)) <= 1e-4
    for version in (1, 2):
        move(model)
        assert worst(model, prompts, sample(engine, prompts)) > 1e-2
        engine.sync(weights_of(model), version)
        groups = sample(engine, prompts)
        assert worst(model, prompts, groups) <= 1e-4
        assert {t.policy_version for group in groups for t in group} == {version}
    greedy = SamplingParams(max_thought_tokens=9, temperature=0.0)
    assert tokens(sample(engine, prompts, greedy, n=1)) == tokens(
        sample(HFEngine(model), prompts, greedy, n=1)
    )
    serving.client.post(
        "/collective_rpc",
        headers={"Authorization": f"Bearer {TOKEN}"},
        json={"method": "reload_weights", "kwargs": {"weights_path": "good"}},
    )


def test_the_probe_finds_one_stale_server_of_several(tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    from rollout.probe import Probe, StaleWeights
    from rollout.vllm_routes import VLLMRoutes
    from tests.builders.vllm import ask, move, weights_of

    for name in "ab":
        (tmp_path / name).mkdir()
    first = Serving(tmp_path / "a", "hf")
    second = Serving(tmp_path / "b", "hf", "--weights-dir", str(first.weights))
    model, load = AutoModelForCausalLM.from_pretrained(first.model).eval(), VLLMRoutes.load_weights

    async def forgetful(server, folder, mark):
        if server.url == second.url:
            return await server.ask("/update_weight_version", json={"new_version": mark})
        await load(server, folder, mark)

    try:
        engine = VLLMServerEngine(
            [first.url, second.url], model=first.model, weights_dir=first.weights / "run", token=TOKEN
        )
        probe = Probe(VOCABULARY, engine.block_size, engine.max_model_len)
        engine.sync(weights_of(model), 0)
        assert ask(probe, model, engine, 0) <= 1e-4
        move(model)
        monkeypatch.setattr(VLLMRoutes, "load_weights", forgetful)
        engine.sync(weights_of(model), 1)
        with pytest.raises(StaleWeights, match="1 of 2 engines"):
            ask(probe, model, engine, 1)
        engine.close()
    finally:
        first.close()
        second.close()


def test_a_trainer_with_another_token_is_told(serving, tmp_path):
    from rollout.servers import EngineUnavailable

    with pytest.raises(EngineUnavailable, match="refuses the token"):
        VLLMServerEngine(
            [serving.url],
            model=serving.model,
            weights_dir=tmp_path,
            token="another-token-entirely",
            deadline=5.0,
        )


def test_a_frozen_engine_needs_no_folder_for_weights(serving, tmp_path):
    """The service may not read `tmp_path`; an engine that is never synced does not ask it to."""
    from rollout.servers import Refused

    place = {"model": serving.model, "weights_dir": tmp_path, "token": TOKEN, "deadline": 30.0}
    with pytest.raises(Refused, match=r"may not read engine\.weights_dir"):
        VLLMServerEngine([serving.url], **place)
    engine = VLLMServerEngine([serving.url], **place, frozen=True)
    try:
        ((thought,),) = asyncio.run(engine.sample([Prompt((5, 6), ())], SamplingParams(3), 1, [7]))
        assert 1 <= len(thought.token_ids) <= 3
        with pytest.raises(RuntimeError, match="frozen: its servers keep their weights"):
            engine.sync(lambda: [], 1)
    finally:
        engine.close()


def test_a_client_that_goes_away_stops_its_sampling(serving):
    body = rollout(params={"max_thought_tokens": 500}, n=64)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{serving.url}/rollout", json=body, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=0.2
        )
    end = time.monotonic() + 5
    while serving.client.get("/health").json()["in_flight"]:
        assert time.monotonic() < end
        time.sleep(0.02)
    numbers = serving.client.get("/metrics", headers={"Authorization": f"Bearer {TOKEN}"}).text
    assert 'rlpretrain_requests_total{route="/rollout",status="499"} 1.0' in numbers


# the routes, with the hf engine in this process


@pytest.fixture(scope="module")
def model():
    return tiny_model("qwen3", 40, initializer_range=0.3)


def served(model, tokenizer=None, **changes) -> Served:
    engine = BatchedEngine(HFEngine(model, tokenizer=tokenizer, shares_weights=False))
    facts = {
        "max_model_len": 256,
        "vocabulary": 40,
        "eos_ids": (1,),
        "version": "9.9",
        "tokenizer": tokenizer,
    }
    return Served(engine, "tiny", **facts | changes)


@pytest.fixture(scope="module")
def client(model):
    tokenizer = word_tokenizer(f"w{i}" for i in range(37))
    with TestClient(create_app(served(model, tokenizer)), raise_server_exceptions=False) as client:
        yield client


def groups_of(client, prompts, n=3, seeds=None, **params) -> list[dict]:
    body = {
        "prompts": [asdict(p) for p in prompts],
        "params": {"max_thought_tokens": 9} | params,
        "n": n,
        "seeds": seeds or list(range(len(prompts))),
    }
    answer = client.post("/rollout", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["groups"]


def test_groups_are_those_of_the_engine(client, model):
    prompts = prompts_of([4, 9, 2])
    direct = sample(HFEngine(model), prompts, n=3)
    for group, prompt, thoughts in zip(groups_of(client, prompts), prompts, direct, strict=True):
        assert group["prompt"]["token_ids"] == list(prompt.token_ids) and group["policy_version"] == 0
        assert [t["token_ids"] for t in group["thoughts"]] == [list(t.token_ids) for t in thoughts]
        assert [t["seed"] for t in group["thoughts"]] == [t.seed for t in thoughts]
        assert [t["finish_reason"] for t in group["thoughts"]] == [str(t.finish_reason) for t in thoughts]
        for a, b in zip(group["thoughts"], thoughts, strict=True):
            assert a["behaviour_logps"] == pytest.approx(b.behaviour_logps, abs=1e-5)


def test_positions_come_back_with_their_groups(client):
    (prompt,) = prompts_of([4])
    position = {
        "document_id": "d7",
        "index": 4,
        "context_ids": [1, 2, 3, 4],
        "target_ids": [5],
        "suffix_ids": [],
    }
    body = {
        "prompts": [asdict(prompt)],
        "params": {"max_thought_tokens": 2},
        "seeds": [255],
        "positions": [position],
    }
    (group,) = client.post("/rollout", json=body).json()["groups"]
    assert group["position"] == position and group["id"] == "d7@4:ff"


def test_completions_are_vllms(client, model):
    (prompt,) = prompts_of([6], stop_ids=tuple(range(3, 12)))
    body = {
        "prompt": list(prompt.token_ids),
        "n": 4,
        "seed": 3,
        "max_tokens": 9,
        "logprobs": 0,
        "return_token_ids": True,
        "stop_token_ids": list(prompt.stop_ids),
        "ignore_eos": True,
    }
    said = client.post("/v1/completions", json=body).json()
    (thoughts,) = sample(HFEngine(model), [prompt], n=4, seeds=[3])
    assert [c["token_ids"] for c in said["choices"]] == [list(t.token_ids) for t in thoughts]
    assert [c["seed"] for c in said["choices"]] == [t.seed for t in thoughts]
    for choice, thought in zip(said["choices"], thoughts, strict=True):
        closed = thought.finish_reason is FinishReason.CLOSE
        assert choice["finish_reason"] == ("stop" if closed else "length")
        assert choice["stop_reason"] == (thought.token_ids[-1] if closed else None)
        assert len(choice["logprobs"]["token_logprobs"]) == len(thought.token_ids)
    assert said["usage"]["completion_tokens"] == sum(len(t.token_ids) for t in thoughts)


def test_banned_ids_are_never_sampled(client, model):
    """By either route; a bias that does not ban is refused."""
    (prompt,), banned = prompts_of([6], stop_ids=()), list(range(0, model.config.vocab_size, 2))
    (expected,) = sample(HFEngine(model), [prompt], replace(PARAMS, banned_ids=tuple(banned)), seeds=[3])
    (group,) = groups_of(client, [prompt], seeds=[3], banned_ids=banned)
    assert [t["token_ids"] for t in group["thoughts"]] == [list(t.token_ids) for t in expected]
    assert not any(set(t.token_ids) & set(banned) for t in expected)
    body = vllm_routes.completion("", prompt, replace(PARAMS, banned_ids=tuple(banned)), 3, 3)
    said = client.post("/v1/completions", json={k: v for k, v in body.items() if k != "model"}).json()
    assert [c["token_ids"] for c in said["choices"]] == [list(t.token_ids) for t in expected]
    refused = client.post("/v1/completions", json={"prompt": [1], "logit_bias": {"3": 1.5}})
    assert refused.status_code == 400 and "logit_bias" in refused.text


def test_text_in_and_out(client):
    said = client.post("/v1/completions", json={"prompt": "w1 w2 w3", "max_tokens": 5, "seed": 1}).json()
    assert said["usage"]["prompt_tokens"] == 3 and said["choices"][0]["text"].startswith("w")
    assert said["choices"][0]["token_ids"] is None and said["choices"][0]["logprobs"] is None


def test_calls_share_batches_and_get_their_own(client, model, monkeypatch):
    """The engine is called fewer times than there are clients, and each client gets its own thoughts."""
    calls, inner = [], HFEngine.sample

    async def counted(self, prompts, *rest):
        calls.append(len(prompts))
        time.sleep(0.05)
        return await inner(self, prompts, *rest)

    prompts = prompts_of([4 + i for i in range(16)])
    alone = [groups_of(client, [p], seeds=[i])[0] for i, p in enumerate(prompts)]
    monkeypatch.setattr(HFEngine, "sample", counted)
    found: dict[int, dict] = {}
    threads = [
        threading.Thread(target=lambda i=i: found.update({i: groups_of(client, [prompts[i]], seeds=[i])[0]}))
        for i in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(calls) == 16 and len(calls) < 16
    for i in range(16):
        assert [t["token_ids"] for t in found[i]["thoughts"]] == [
            t["token_ids"] for t in alone[i]["thoughts"]
        ]


def test_weights_are_loaded_marked_and_forgotten(model, tmp_path):
    from rollout.weights import parameters_of
    from tests.builders.vllm import weights_of

    other = tiny_model("qwen3", 40, seed=5, initializer_range=0.3)
    own = tiny_model("qwen3", 40, initializer_range=0.3)
    own.save_pretrained(tmp_path / "model")
    write_weights(tmp_path / "weights" / "v1", dict(weights_of(other)()))
    app = create_app(
        served(own, parameters=parameters_of(tmp_path / "model")), weights_dir=tmp_path / "weights"
    )
    (prompt,) = prompts_of([6])
    with TestClient(app) as client:
        load = {"method": "reload_weights", "kwargs": {"weights_path": "v1"}}
        assert client.get("/weight_info").json() == {"weight_version": None}
        assert client.post("/collective_rpc", json=load).status_code == 200
        client.post("/update_weight_version", json={"new_version": "run@1"})
        assert client.get("/weight_info").json() == {"weight_version": "run@1"}
        (group,) = groups_of(client, [prompt])
        assert [tuple(t["token_ids"]) for t in group["thoughts"]] == tokens(
            sample(HFEngine(other), [prompt])
        )[0]
        assert group["policy_version"] == 1
        assert client.post("/collective_rpc", json=load).status_code == 200
        assert client.get("/weight_info").json() == {"weight_version": None}  # other weights, no name yet
    (again,) = sample(HFEngine(own), [prompt])  # the engine was closed with the app, its model was loaded
    assert tokens([again]) == tokens(sample(HFEngine(other), [prompt]))


def test_while_paused_nothing_starts_and_what_ran_is_aborted(model):
    started = threading.Event()

    class Slow(HFEngine):
        async def sample(self, *what):
            started.set()
            time.sleep(0.3)
            return await super().sample(*what)

    engine = BatchedEngine(Slow(model, shares_weights=False))
    (prompt,) = prompts_of([6])
    with TestClient(create_app(Served(engine, "tiny", 256, 40))) as client:
        found: list[dict] = []
        run = threading.Thread(target=lambda: found.extend(groups_of(client, [prompt])))
        run.start()
        started.wait(5)
        assert client.post("/pause").json() == {"status": "paused"} and client.get("/is_paused").json() == {
            "is_paused": True
        }
        run.join(5)
        assert {t["finish_reason"] for t in found[0]["thoughts"]} == {"abort"} and len(
            found[0]["thoughts"]
        ) == 3
        late = threading.Thread(target=lambda: found.extend(groups_of(client, [prompt])))
        late.start()
        late.join(0.5)
        assert late.is_alive()
        client.post("/resume")
        late.join(5)
        assert "abort" not in {t["finish_reason"] for t in found[1]["thoughts"]}


def test_limits_of_time_and_number(model):
    class Slow(HFEngine):
        async def sample(self, *what):
            time.sleep(0.5)
            return await super().sample(*what)

    engine = BatchedEngine(Slow(model, shares_weights=False))
    app = create_app(
        Served(engine, "tiny", 256, 40),
        limits=Limits(requests=1, request_s=0.2, body_bytes=2000, held_bytes=2000),
    )
    body = {"prompts": [{"token_ids": [5]}], "params": {"max_thought_tokens": 2}, "seeds": [0]}
    with TestClient(app) as client:
        assert client.post("/rollout", json=body).status_code == 504

        async def two():
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://x") as both:
                return await asyncio.gather(
                    both.post("/rollout", json=body), both.post("/rollout", json=body)
                )

        answers = sorted(client.portal.call(two), key=lambda a: a.status_code)
        assert [a.status_code for a in answers] == [429, 504] and answers[0].headers["retry-after"] == "1"

        def chunks():
            for _ in range(5):
                yield b" " * 1000

        assert (
            client.post(
                "/rollout", content=chunks(), headers={"content-type": "application/json"}
            ).status_code
            == 413
        )


def test_a_body_that_does_not_come(model):
    """A client that sends half a body and waits does not keep its place."""
    app = create_app(served(model), limits=Limits(body_s=0.1))
    sent: list[dict] = []

    async def half():
        messages = iter([{"type": "http.request", "body": b"{", "more_body": True}])

        async def receive():
            try:
                return next(messages)
            except StopIteration:
                await asyncio.sleep(3600)

        async def send(message):
            sent.append(message)

        headers = [(b"content-type", b"application/json")]
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/rollout",
            "raw_path": b"/rollout",
            "query_string": b"",
            "root_path": "",
            "headers": headers,
            "http_version": "1.1",
            "scheme": "http",
            "server": ("x", 80),
        }
        await asyncio.wait_for(app(scope, receive, send), 5)

    with TestClient(app) as client:
        client.portal.call(half)
    assert sent[0]["status"] == 408


def test_an_engine_that_fails_says_nothing_of_why(model):
    class Broken(HFEngine):
        async def sample(self, *what):
            raise RuntimeError("the password is swordfish")

    app = create_app(Served(BatchedEngine(Broken(model)), "tiny", 256, 40))
    with TestClient(app, raise_server_exceptions=False) as client:
        body = {"prompts": [{"token_ids": [5]}], "params": {"max_thought_tokens": 2}, "seeds": [0]}
        answer = client.post("/rollout", json=body)
        assert answer.status_code == 500 and "swordfish" not in answer.text
        assert 'rlpretrain_requests_total{route="/rollout",status="500"} 1.0' in client.get("/metrics").text


@pytest.mark.parametrize("heat", [1e-154, 0.009, -1, 101])
def test_temperatures_no_float32_stands_are_refused(client, heat):
    body = {
        "prompts": [{"token_ids": [5]}],
        "params": {"max_thought_tokens": 2, "temperature": heat},
        "seeds": [0],
    }
    for answer in (
        client.post("/rollout", json=body),
        client.post("/v1/completions", json={"prompt": [5], "temperature": heat}),
    ):
        assert answer.status_code == 400 and "temperature" in answer.text


ids = st.lists(st.integers(-2, 60) | st.integers(), max_size=6)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
almost = st.fixed_dictionaries(
    {
        "prompts": st.lists(
            st.fixed_dictionaries(
                {"token_ids": ids},
                optional={
                    "stop_ids": ids,
                    "stop_strings": st.lists(st.text(max_size=3), max_size=2),
                    "join_ids": ids,
                },
            ),
            max_size=3,
        ),
        "params": st.fixed_dictionaries(
            {"max_thought_tokens": st.integers(-1, 5)},
            optional={
                "temperature": st.floats() | st.sampled_from([0, 1]),
                "top_p": st.floats(-0.1, 1.1),
                "top_k": st.integers(-2, 50),
                "eos_ids": ids,
            },
        ),
        "n": st.integers(-1, 3),
        "seeds": st.lists(st.integers(0, 2**63), max_size=3),
    },
    optional={
        "positions": st.lists(
            st.fixed_dictionaries({"document_id": st.text(max_size=4), "index": st.integers()}), max_size=3
        ),
        "extra": anything,
    },
)
completion = st.fixed_dictionaries(
    {"prompt": ids | st.lists(ids, max_size=3) | st.text(max_size=20)},
    optional={
        "n": st.integers(-1, 3),
        "max_tokens": st.integers(-1, 5),
        "temperature": st.floats(),
        "top_k": st.integers(-2, 3),
        "seed": st.integers(),
        "stop": st.text(max_size=3) | st.lists(st.text(max_size=3), max_size=2),
        "logprobs": st.integers(0, 1),
        "model": st.text(max_size=5),
        "return_token_ids": st.booleans(),
        "stop_token_ids": ids,
    },
)
ROUTES = [
    "/rollout",
    "/v1/completions",
    "/collective_rpc",
    "/update_weight_version",
    "/reset_prefix_cache",
    "/resume",
]


def answered(answer: httpx.Response) -> None:
    """Never a 5xx, always JSON."""
    assert answer.status_code in (200, 400, 403, 404, 405, 413), answer.text
    json.loads(answer.text)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(body=almost)
def test_fuzz_rollout(client, body):
    answer = client.post("/rollout", content=json.dumps(body), headers={"content-type": "application/json"})
    answered(answer)
    if answer.status_code == 200:
        groups = answer.json()["groups"]
        assert len(groups) == len(body["prompts"]) and all(len(g["thoughts"]) == body["n"] for g in groups)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(body=completion)
def test_fuzz_completions(client, body):
    answered(
        client.post("/v1/completions", content=json.dumps(body), headers={"content-type": "application/json"})
    )


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    route=st.sampled_from(ROUTES),
    mode=st.text(max_size=5).filter(lambda mode: mode not in ("abort", "wait", "keep")),  # these are valid
    body=anything.map(json.dumps).map(str.encode) | st.binary(max_size=40),
)
def test_fuzz_every_route(client, route, mode, body):
    answered(client.post(route, content=body, headers={"content-type": "application/json"}))
    answer = client.post("/pause", params={"mode": mode})
    assert answer.status_code == 400
    answered(answer)


# the command


def test_who_may_reach_it_from_elsewhere_needs_a_token(tmp_path, capsys):
    (tmp_path / "short").write_text("abc")
    for options, words in (
        (["--host", "0.0.0.0"], "--host 0.0.0.0 can be reached from elsewhere: give --token-file"),
        (["--host", "trainer.example"], "can be reached from elsewhere"),
        (["--token-file", str(tmp_path / "none")], "No such file"),
        (["--token-file", str(tmp_path / "short")], "one word of at least 16 ASCII characters"),
        (["--weights-dir", str(tmp_path / "none")], "there is no such folder"),
        (["--engine", "hf"], "no such folder"),
    ):
        assert main(["serve", str(tmp_path / "model"), *options]) == 2
        assert words in capsys.readouterr().err


def test_prompt_bodies_read_back_as_prompts():
    from rollout.wire import PromptBody

    prompt = Prompt((1, 2), (3,), (4,), (5,), ("x",))
    assert PromptBody(**asdict(prompt)).prompt() == prompt
    assert VOCABULARY == 300


def test_a_truth_is_no_number_in_any_body(client):
    """Issue 15.19: JSON's true was read as token id 1, n 1 and temperature 1."""
    from rollout import wire

    good = {
        wire.Rollout: {
            "prompts": [{"token_ids": [5], "stop_ids": [7], "close_ids": [7], "join_ids": [8]}],
            "n": 1,
            "seeds": [3],
            "params": {"max_thought_tokens": 2, "temperature": 1, "top_p": 1, "top_k": 0, "eos_ids": [1]},
            "positions": [
                {"document_id": "d", "index": 1, "context_ids": [5], "target_ids": [6], "suffix_ids": [7]}
            ],
        },
        wire.Completion: {
            "prompt": [5, 6],
            "n": 1,
            "max_tokens": 2,
            "temperature": 1,
            "top_p": 1,
            "top_k": 0,
            "seed": 3,
            "stop_token_ids": [7],
            "logprobs": 0,
        },
    }
    routes = {wire.Rollout: "/rollout", wire.Completion: "/v1/completions"}
    for kind, body in good.items():
        assert client.post(routes[kind], json=body).status_code == 200
        places = list(numbers(body))
        assert len(places) >= 9
        for place in places:
            for truth in (True, False):
                answer = client.post(routes[kind], json=changed(body, place, truth))
                assert answer.status_code == 400, (place, truth, answer.text)
                assert str(place[-1]) in answer.text or str(place[-2]) in answer.text


def numbers(body, where=()):
    """The place of every number in a body."""
    items = body.items() if isinstance(body, dict) else enumerate(body) if isinstance(body, list) else ()
    for key, value in items:
        if isinstance(value, int | float):
            yield (*where, key)
        yield from numbers(value, (*where, key))


def changed(body, place, value):
    """A copy with another value at a place."""
    body = json.loads(json.dumps(body))
    node = body
    for key in place[:-1]:
        node = node[key]
    node[place[-1]] = value
    return body
