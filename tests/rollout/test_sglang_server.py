"""The client of SGLang servers against SGLang's recorded contract (tests/builders/sglang.py).

No server of SGLang has run here (docs/engines.md). What is checked is that the client sends what the source
of sglang 0.5.23 takes, and reads what it gives. test_sglang_real.py takes a real server.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from rlpretrain import cli
from rlpretrain.config import ConfigError
from rlpretrain.config.io import build
from rlpretrain.rollouts.engines import find_engine
from rollout import FinishReason, Prompt, SamplingParams
from rollout.probe import Probe, StaleWeights
from rollout.servers import EngineUnavailable, Refused
from tests.builders.runs import merged
from tests.builders.sampling import (
    PARAMS,
    VOCABULARY,
    ask,
    move,
    prompts_of,
    sample,
    tokens,
    weights_of,
    worst,
)
from tests.builders.sglang import CONTRACT, Contract, SGLangServer
from tests.builders.tiny import tiny_model

pytest.importorskip("httpx")
from rollout.sglang_server import SGLangServerEngine  # noqa: E402

EOS = 1
SHAPE = {"initializer_range": 0.3, "max_position_embeddings": 256, "tie_word_embeddings": True}


@pytest.fixture
def model(tmp_path):
    model = tiny_model("qwen3", VOCABULARY, **SHAPE)
    model.folder = tmp_path / "base"
    model.save_pretrained(model.folder)
    return model


@pytest.fixture
def serve(model):
    made = []

    def start(**info) -> SGLangServer:
        made.append(SGLangServer(tiny_model("qwen3", VOCABULARY, **SHAPE), eos=EOS, **info))
        return made[-1]

    yield start
    for server in made:
        server.close()


@pytest.fixture
def make(model, tmp_path):
    made = []

    def start(*urls: str, sync: bool = True, **settings) -> SGLangServerEngine:
        settings = {"request_timeout": 60.0, "deadline": 60.0, "patience": 0.1} | settings
        made.append(
            SGLangServerEngine(urls, model=model.folder, weights_dir=tmp_path / "weights", **settings)
        )
        if sync:
            made[-1].sync(weights_of(model), 0)
        return made[-1]

    yield start
    for engine in made:
        engine.close()


def test_log_probs_are_the_trainers_after_every_sync(make, model, serve):
    engine = make(serve().url, vocabulary=VOCABULARY)
    prompts = prompts_of([12, 3, 33])
    probe = Probe(VOCABULARY, engine.block_size, engine.max_model_len)
    assert probe.covers_cache and (engine.block_size, engine.max_model_len) == (16, 254)
    for version in (1, 2):
        move(model)
        assert worst(model, prompts, sample(engine, prompts)) > 1e-2
        engine.sync(weights_of(model, drop=("lm_head.weight",)), version)
        groups = sample(engine, prompts)
        assert worst(model, prompts, groups) <= 1e-4 and ask(probe, model, engine, version) <= 1e-4
        assert {t.policy_version for group in groups for t in group} == {version}
    assert [p.name for p in engine.weights_dir.iterdir()] == ["version-2"]


def test_the_probe_finds_weights_that_were_not_loaded(make, model, serve):
    server = serve()
    engine = make(server.url)
    probe = Probe(VOCABULARY, engine.block_size, engine.max_model_len)
    ask(probe, model, engine, 0)
    move(model)
    server.fault = "stale"
    engine.sync(weights_of(model), 1)
    with pytest.raises(StaleWeights, match="a tensor did not arrive"):
        ask(probe, model, engine, 1)


def test_thoughts_of_a_prompt_differ_and_can_be_drawn_again(make, serve):
    engine, prompts = make(serve().url, serve().url), prompts_of([12, 3, 20, 9])
    groups = sample(engine, prompts, n=4)
    assert [t.seed for t in groups[2]] == [2, 3, 4, 5]
    assert all(len(set(each)) > 1 for each in tokens(groups))
    again = asyncio.run(engine.sample([prompts[2]], PARAMS, 1, [groups[2][3].seed]))
    assert again[0][0].token_ids == groups[2][3].token_ids
    assert tokens(sample(engine, prompts, n=4)) == tokens(groups)


def test_endings(make, serve):
    engine = make(serve().url)
    prompt = Prompt(prompts_of([12])[0].token_ids, stop_ids=tuple(range(3, 12)))
    named = SamplingParams(max_thought_tokens=9, eos_ids=tuple(range(20, 30)))
    thoughts = sample(engine, [prompt], named, n=24)[0]
    for thought in thoughts:
        last, reason = thought.token_ids[-1], thought.finish_reason
        assert (reason is FinishReason.CLOSE) == (last in prompt.stop_ids)
        assert (reason is FinishReason.EOS) == (last in named.eos_ids or last == EOS)
        assert reason is not FinishReason.LENGTH or len(thought.token_ids) == 9
    unnamed = sample(engine, [Prompt(prompt.token_ids, ())], SamplingParams(30), n=8)[0]
    assert FinishReason.EOS in {t.finish_reason for t in unnamed if t.token_ids[-1] == EOS}
    assert all(t.finish_reason is FinishReason.EOS for t in unnamed if len(t.token_ids) < 30)


def test_stop_strings_and_bans_are_sent_as_sglang_names_them(make, serve):
    server = serve()
    engine = make(server.url)
    banned = tuple(range(0, 40, 2))
    params = SamplingParams(max_thought_tokens=9, temperature=2.0, banned_ids=banned)
    groups = sample(engine, [Prompt((1, 2), (), stop_strings=("w1",))], params, n=8)
    assert not any(set(t.token_ids) & set(banned) for group in groups for t in group)
    how = next(body for route, body in reversed(server.asked) if route == "/generate")["sampling_params"][0]
    assert how["stop"] == ["w1"] and how["ignore_eos"] is False and how["no_stop_trim"] is True


@pytest.mark.parametrize("fault", ["abort", "two_loads"])
def test_what_was_aborted_or_spans_two_loads_is_sampled_again(make, serve, fault):
    server = serve()
    engine, prompts = make(server.url), prompts_of([12, 3])
    expected = tokens(sample(engine, prompts))
    server.fault = fault
    assert tokens(sample(engine, prompts)) == expected
    assert engine.health()["retries"] >= 1 and "server_failures" not in engine.health()


def test_a_failing_server_is_left_out_and_comes_back_with_the_present_weights(make, model, serve):
    bad, good = serve(), serve()
    engine, prompts = make(bad.url, good.url), prompts_of([12, 3, 20])
    bad.fault = "503"
    expected = tokens(sample(engine, prompts))
    assert engine.health()["server_failures"] >= 1
    bad.fault, good.fault = "", "503"
    bad.version = None  # restarted
    assert tokens(sample(engine, prompts)) == expected
    assert engine.health()["servers_taken_back"] >= 1 and bad.version == good.version


def test_weights_that_no_server_can_load_end_the_sync(make, model, serve):
    server = serve()
    engine = make(server.url, deadline=60.0)
    server.fault = "refuse"
    with pytest.raises(
        EngineUnavailable, match=r"no SGLang server took the weights of version 1 .*Failed to"
    ):
        engine.sync(weights_of(model), 1)


@pytest.mark.parametrize(
    ("info", "settings", "said"),
    [
        ({"version": "0.5.22"}, {}, r"runs SGLang 0.5.22; its routes are known from 0.5.23 to below 0.6.0"),
        ({"enable_deterministic_inference": False}, {}, r"ignores seeds: .*--enable-deterministic-inference"),
        ({"token": "secret"}, {"token": "other"}, "does not know this token: set engine.token_file"),
        ({}, {"vocabulary": VOCABULARY + 2}, "of fewer than 42 tokens.*rlpretrain tag MODEL --out DIR"),
        ({}, {"vocabulary": VOCABULARY - 1}, "of more than 39 tokens"),
    ],
)
def test_a_server_that_cannot_serve_the_run_is_refused(make, serve, info, settings, said):
    with pytest.raises(Refused, match=said):
        make(serve(**info).url, **settings)


def test_what_is_accepted_at_the_users_word(make, serve):
    server = serve(enable_deterministic_inference=False, token="secret")
    assert sample(make(server.url, deterministic=False, token="secret"), prompts_of([4]))


def test_truncated_distributions_are_refused(make, serve, values):
    engine = make(serve().url)
    for params in (SamplingParams(9, top_p=0.9), SamplingParams(9, top_k=5)):
        with pytest.raises(
            ValueError, match="SGLang gives log-probabilities before top-p and top-k truncate"
        ):
            sample(engine, prompts_of([4]), params)
    settings = merged(values, engine={"name": "sglang_server", "urls": ["http://x"]}, sampling={"top_p": 0.5})
    config = build(settings | {"objective": "rlp"})
    with pytest.raises(ConfigError, match=r"sampling.top_p is 0.5, and SGLang"):
        find_engine(config.engine)(cast(Any, SimpleNamespace(config=config, settings=config.engine)))


def test_a_prompt_that_is_too_long_is_refused_before_sglang_would_shorten_the_thought(make, serve):
    engine = make(serve().url)
    with pytest.raises(ValueError, match="over the model's 254 positions"):
        sample(engine, [Prompt((5,) * 250, ())])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sampling_params": [{"max_tokens": 4}]}, "max_tokens"),
        ({"sampling_params": [{"sampling_seed": "7"}]}, "sampling_seed"),
        ({"sampling_params": [{"stop_token_ids": 5}]}, "stop_token_ids"),
        ({"prompt": [[1]]}, "prompt"),
        ({"input_ids": "text"}, "input_ids"),
    ],
)
def test_the_contract_can_fail(change, said):
    contract = Contract(CONTRACT)
    body = {"input_ids": [[1]], "sampling_params": [{"max_new_tokens": 4}], "return_logprob": True}
    contract.request("/generate", "POST", body)
    with pytest.raises(ValueError, match=said):
        contract.request("/generate", "POST", body | change)
    with pytest.raises(ValueError, match="no route"):
        contract.request("/generate", "GET", body)
    with pytest.raises(ValueError, match="weights_path"):
        contract.request("/update_weights_from_disk", "POST", {"weights_path": "x"})
    with pytest.raises(ValueError, match="logprobs"):
        contract.answer("/generate", 200, [{"text": "", "meta_info": {"logprobs": []}}])


def test_the_contract_is_that_of_the_version_that_the_client_knows():
    from rollout.sglang_routes import NEEDED, SUPPORTED

    assert tuple(map(int, CONTRACT["version"].split("."))) == SUPPORTED[0]
    assert set(NEEDED) == set(CONTRACT["server_info"])


def test_a_run_trains_on_what_a_server_samples(values, tmp_path, capsys):
    """`rlpretrain train`, its probe after each sync included, and the dry run."""
    from transformers import AutoModelForCausalLM

    folder = Path(values["model"]["path"] if isinstance(values["model"], dict) else values["model"])
    served = AutoModelForCausalLM.from_pretrained(folder)
    server = SGLangServer(served, eos=EOS)
    settings = merged(values, engine={"name": "sglang_server", "urls": [server.url]}, max_steps=2)
    (tmp_path / "c.json").write_text(json.dumps(settings))
    try:
        code = cli.main(["train", str(tmp_path / "c.json")])
    finally:
        server.close()
    assert code == 0, capsys.readouterr().err
    lines = (Path(settings["output_dir"]) / "metrics.jsonl").read_text().splitlines()
    probed = [json.loads(line).get("sampling/probe_difference") for line in lines]
    assert max(value for value in probed if value is not None) <= 1e-3
