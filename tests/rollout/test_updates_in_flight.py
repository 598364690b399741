"""`engine.updates: in_flight` with a real vLLM server: weights change while thoughts are being sampled."""

from __future__ import annotations

import asyncio
import copy
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from rlpretrain import Pretrainer
from rlpretrain.config.io import build
from rlpretrain.tracking.step_metrics import staleness
from rollout import FinishReason, Prompt, SamplingParams, Thought
from rollout.servers import Refused
from rollout.store import Store
from rollout.stored_rows import group_from_row, group_to_row
from rollout.types import Group, Position
from rollout.vllm_routes import VLLMRoutes
from rollout.vllm_streams import Streamed
from tests.builders.sampling import prompts_of, sample, tokens
from tests.builders.servers import VLLMServer

pytest.importorskip("vllm", reason="needs the CPU build of vLLM: make env LOCK=test-cpu")
from rollout.vllm_server import VLLMServerEngine  # noqa: E402
from tests.builders.vllm import move, served_model, weights_of, worst  # noqa: E402

LONG = SamplingParams(max_thought_tokens=400)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return served_model(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def server(model, tmp_path_factory) -> Iterator[VLLMServer]:
    server = VLLMServer(model.folder, tmp_path_factory.mktemp("log") / "server.log").start().ready()
    yield server
    server.kill()


@pytest.fixture
def engines(model, server, tmp_path):
    """(in flight, drained)"""
    made = []
    for in_flight in (True, False):
        folder = tmp_path / str(in_flight)
        engine = VLLMServerEngine(
            [server.url], model=model.folder, weights_dir=folder, block_size=32, in_flight=in_flight
        )
        engine.sync(weights_of(model), 0)
        made.append(engine)
    yield made
    for engine in made:
        engine.close()


def by_version(models: dict[int, torch.nn.Module], prompt: Prompt, thought: Thought) -> list[float]:
    """The log-prob of each id from the model of the version that the thought names for it."""
    ids = torch.tensor([[*prompt.token_ids, *thought.token_ids]])
    start, count = len(prompt.token_ids), len(thought.token_ids)
    own = {}
    for version, model in models.items():
        with torch.no_grad():
            logps = model(input_ids=ids).logits[0, start - 1 : -1].log_softmax(-1)
        own[version] = logps.gather(1, ids[0, start:, None])[:, 0]
    spans = [(0, thought.policy_version), *thought.updates]
    versions = [max(span for span in spans if span[0] <= i)[1] for i in range(count)]
    return [float(own[version][i]) for i, version in enumerate(versions)]


@pytest.mark.slow
def test_thoughts_go_on_with_new_weights(model, engines):
    """Each id has the log-prob of the weights that it names, what came before it read by them too."""
    engine, _ = engines
    prompts = prompts_of([12, 40, 70], stop_ids=())
    sample(engine, prompts, n=4)  # what the first requests compile
    prompted = engine.counts["prompts"]
    models = {0: copy.deepcopy(model)}
    groups: list = []
    thread = threading.Thread(
        target=lambda: groups.extend(asyncio.run(engine.sample(prompts, LONG, 4, [1, 11, 21])))
    )
    thread.start()
    for version in (1, 2):
        time.sleep(0.5)
        move(model)
        engine.sync(weights_of(model), version)
        models[version] = copy.deepcopy(model)
        assert engine.counts["prompts"] == prompted  # nobody waited for the thoughts
    thread.join()
    thoughts = [(prompt, t) for prompt, group in zip(prompts, groups, strict=True) for t in group]
    assert len(thoughts) == 12 and all(len(t.token_ids) == 400 for _, t in thoughts)
    assert any(len(t.updates) == 2 for _, t in thoughts)
    for prompt, thought in thoughts:
        assert thought.behaviour_logps == pytest.approx(by_version(models, prompt, thought), abs=1e-4)
        assert [v for _, v in thought.updates] == sorted({v for _, v in thought.updates})
    (fresh,) = asyncio.run(engine.sample(prompts[:1], LONG, 1, [5]))
    assert fresh[0].policy_version == 2 and not fresh[0].updates
    assert worst(model, prompts[:1], [fresh]) <= 1e-4


@pytest.mark.slow
def test_in_parts_thoughts_are_those_of_a_whole_answer(engines):
    in_parts, whole = engines
    prompts = prompts_of([12, 3, 20], stop_ids=tuple(range(3, 12)))
    params = SamplingParams(max_thought_tokens=30, eos_ids=tuple(range(20, 30)))
    texts = [Prompt(prompts[0].token_ids, (), stop_strings=("w1",))]
    for asked in (prompts, texts):
        one, other = sample(in_parts, asked, params), sample(whole, asked, params)
        assert tokens(one) == tokens(other)
        for a, b in zip(sum(one, []), sum(other, []), strict=True):
            assert (a.finish_reason, a.seed, a.updates) == (b.finish_reason, b.seed, ())
            assert a.behaviour_logps == pytest.approx(b.behaviour_logps, abs=1e-5)


@pytest.mark.slow
def test_a_run_trains_with_thoughts_of_several_versions(model, server, tmp_path):
    words = [f"w{i}" for i in range(20, 60)]
    texts = [" ".join(words[i : i + 20]) for i in range(16)]
    (tmp_path / "documents.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    values = {
        "model": str(model.folder),
        "data": {"path": str(tmp_path / "documents.jsonl"), "max_length": 64},
        "objective": {"name": "rlp", "open": "w5", "close": "w6"},
        "sampling": {"thoughts": 3, "max_thought_tokens": 300, "cut": "force_close"},
        "positions_per_step": 4,
        "optim": {"lr": 1e-2, "warmup_steps": 0},
        "engine": {
            "name": "vllm_server",
            "urls": [server.url],
            "block_size": 32,
            "max_staleness": 2,
            "updates": "in_flight",
        },
        "stop": {"collapse": False},
        "checkpoint": {"every": 0},
        "console": False,
        "threads": 1,
        "max_steps": 6,
        "save_rollouts": True,
        "output_dir": str(tmp_path / "run"),
    }
    Pretrainer(build(values)).train()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 6 and all(row["run/skipped_steps"] == 0 for row in rows)
    assert any(row.get("sample/updated_frac") for row in rows)
    assert all(row["sample/staleness_max"] <= 2 for row in rows)
    store = Store(tmp_path / "run" / "rollouts", 0)
    stored = [
        thought for step in store.steps() for group in store.read(step)[0] for thought in group.thoughts
    ]
    assert len(stored) == 6 * 4 * 3 and any(thought.updates for thought in stored)


def test_our_own_service_is_refused():
    class Client:
        async def get(self, route):
            import httpx

            return httpx.Response(200, json={"server": "rlpretrain", "version": "1"})

    with pytest.raises(Refused, match=r"engine\.updates to drained"):
        asyncio.run(VLLMRoutes("http://a", client=Client(), keeps=True).check())


def test_parts_name_the_weights_of_their_ids():
    whole = Streamed(200)
    for version, index, ids in (
        (0, 0, [5]),
        (0, 1, [7, 8]),
        (1, 0, [6]),
        (1, 0, [9]),
        (2, 1, []),
        (2, 1, [3]),
    ):
        logps = {"token_logprobs": [-1.0] * len(ids)}
        whole.add({"index": index, "token_ids": ids, "logprobs": logps, "finish_reason": None}, version)
    whole.add({"index": 0, "token_ids": [], "logprobs": None, "finish_reason": "stop", "stop_reason": 4}, 3)
    first, second = whole.json()["choices"]
    assert (first["token_ids"], first["versions"], first["stop_reason"]) == ([5, 6, 9], [(0, 0), (1, 1)], 4)
    assert (second["token_ids"], second["versions"]) == ([7, 8, 3], [(0, 0), (2, 2)])


def test_updates_are_stored_and_counted():
    thoughts = (
        Thought((1, 2, 3, 4), (-1.0,) * 4, FinishReason.LENGTH, 3, 0, updates=((1, 4), (3, 5))),
        Thought((1, 2), (-1.0,) * 2, FinishReason.LENGTH, 5, 1),
    )
    group = Group("g", Position("d", 1, (1,), (2,)), Prompt((1,), (2,)), thoughts, 3)
    row = json.loads(json.dumps(group_to_row(group)))
    assert group_from_row(row) == group
    found = staleness([group], 5)
    assert found["sample/updated_frac"] == 0.5 and found["sample/staleness_max"] == 2
    assert found["sample/token_staleness_mean"] == pytest.approx((2 + 1 + 1 + 0 + 0 + 0) / 6)
    assert "sample/updated_frac" not in staleness([replace(group, thoughts=thoughts[1:])], 5)
