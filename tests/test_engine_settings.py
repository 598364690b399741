"""The `engine` section: each engine has its own settings, and those of another engine are refused."""

from __future__ import annotations

import copy
import json
import pickle
import re
from dataclasses import fields, replace

import pytest
import torch
import yaml
from pydantic import ValidationError

from rlpretrain.config import ConfigError, EngineConfig, PretrainConfig
from rlpretrain.config.engines import (
    BUILT_IN,
    CustomConfig,
    HFConfig,
    RayConfig,
    VLLMServerConfig,
    own_settings,
)
from rlpretrain.config.io import build, describe, load_config, to_dict
from rlpretrain.experiments.experiment import overlay
from rlpretrain.rollouts.engines import default_tolerance, find_engine
from rlpretrain.training.pretrainer import Pretrainer
from rlpretrain.training.same_settings import check_same
from tests.builders.runs import ROOT, merged, trained

BEFORE = {
    "name": "hf",
    "batch_size": 256,
    "dtype": None,
    "max_model_len": None,
    "kv_cache_gib": 0.5,
    "gpu_memory_utilization": 0.3,
    "block_size": None,
    "sleep": False,
    "max_staleness": 0,
    "in_flight": 4,
    "probe_tolerance": None,
    "options": {},
    "num_engines": 1,
    "of": "vllm_local",
    "resources": {},
    "strategy": "PACK",
    "address": None,
    "urls": [],
    "weights_dir": None,
    "transfer": "file",
    "master_address": None,
    "token_file": None,
    "concurrency": 64,
    "request_timeout": 600.0,
    "deadline": 600.0,
}
"""The section as run.json and checkpoints held it when one class had the settings of all engines."""


def section(given):
    return build({"model": "m", "data": "d", "engine": given}).engine


def test_a_name_gives_the_class_of_its_engine():
    for name, kind in BUILT_IN.items():
        assert type(section(name)) is type(EngineConfig(name=name)) is type(section({"name": name})) is kind
        assert kind().name == name and isinstance(kind(), EngineConfig)
    assert type(section("my.engine:Mine")) is CustomConfig and type(EngineConfig()) is HFConfig
    ray = EngineConfig(name="ray", num_engines=2)
    assert copy.deepcopy(ray) == pickle.loads(pickle.dumps(ray)) == replace(ray) == ray
    assert PretrainConfig(model="m", data="d", engine=ray).engine is ray
    assert replace(ray, of="hf").num_engines == 2
    with pytest.raises(ValidationError, match="HFConfig belongs to another engine"):
        replace(EngineConfig(), name="ray")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"kv_cache_gib": 2},
            "'engine.kv_cache_gib': a setting of engine vllm_local or ray, and engine.name is hf",
        ),
        (
            {"name": "vllm_local", "urls": ["http://x"]},
            "'engine.urls': a setting of engine vllm_server or sglang_server, and engine.name is vllm_local",
        ),
        ({"name": "a:B", "of": "hf"}, "'engine.of': a setting of engine ray, and engine.name is a:B"),
        (
            {"name": "vllm_local", "kv_cach_gib": 2},
            "unknown key 'engine.kv_cach_gib': did you mean 'kv_cache_gib'",
        ),
        ("vlm_local", "'engine.name': no such engine; did you mean 'vllm_local'?"),
        ("sglang", "no such engine; did you mean 'sglang_server'?"),
        ("x", "there are hf, vllm_local, vllm_server, sglang_server, ray, or package.module:Class"),
        ({"name": "ray", "deadline": 0}, "'engine.deadline': Input should be greater than 0"),
    ],
)
def test_a_setting_of_another_engine_is_refused(given, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        section(given)


def test_what_older_versions_wrote_still_loads(values, tmp_path):
    assert section(BEFORE) == EngineConfig()
    served = {"name": "vllm_server", "urls": ["http://a:1"], "num_engines": 8, "kv_cache_gib": None}
    assert type(section(own_settings(BEFORE | served))) is VLLMServerConfig
    trained(merged(values, checkpoint={"every": 2}, max_steps=2))
    file = tmp_path / "run" / "checkpoint-2" / "state.json"
    state = json.loads(file.read_text())
    assert state["config"]["engine"].keys() == {field.name for field in fields(HFConfig)}
    state["config"]["engine"] = BEFORE | {"kv_cache_gib": 2.0}
    file.write_text(json.dumps(state))
    trained(values, resume="auto", checkpoint={"every": 2}, max_steps=3)
    settings = json.loads(json.dumps(to_dict(build(values))))
    with pytest.raises(ConfigError, match="engine.in_flight was 3, is 4"):
        check_same(settings | {"engine": BEFORE | {"in_flight": 3}}, settings, tmp_path)


def test_another_engine_on_the_command_line_leaves_the_settings_of_the_former(values, tmp_path):
    """The documented way from Ray actors to servers, with one configuration file."""
    file = ROOT / "examples" / "cluster" / "qwen3_1p7b.yaml"
    words = ["--engine.urls", "[http://a:1]", "--engine.name", "vllm_server", "--engine.block_size=16"]
    engine = load_config(file, words).engine
    assert engine == EngineConfig(
        name="vllm_server", urls=["http://a:1"], block_size=16, request_timeout=1200, deadline=1800
    )
    with pytest.raises(
        ConfigError, match="a setting of engine vllm_server or sglang_server, and engine.name is ray"
    ):
        load_config(file, ["--engine.urls", "[http://a:1]"])
    with pytest.raises(ConfigError, match="a setting of engine ray, and engine.name is hf"):
        load_config(file, ["--engine.name", "hf", "--engine.num_engines", "2"])
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values | {"engine": "hf"}))
    assert type(load_config(tmp_path / "c.yaml", ["--engine.name=ray"]).engine) is RayConfig
    below = {"engine": {"name": "ray", "num_engines": 2, "deadline": 9}}
    assert overlay(below, {"engine": "vllm_server"})["engine"] == {"name": "vllm_server", "deadline": 9}


def test_every_setting_is_listed_once():
    listed = [name for name, *_ in describe(PretrainConfig) if name.startswith("engine.")]
    assert len(listed) == len(set(listed))
    assert {name.removeprefix("engine.") for name in listed} == BEFORE.keys() | {"deterministic", "updates"}
    assert all(text for name, _, text in describe(PretrainConfig) if name.startswith("engine."))


def test_every_built_in_engine_has_a_factory_that_exists():
    for kind in BUILT_IN.values():
        assert callable(find_engine(kind()))


def test_an_engine_that_sleeps_does_not_sample_ahead(values, monkeypatch):
    from rollout.engine import EngineInfo
    from rollout.hf import HFEngine

    monkeypatch.setattr(HFEngine, "info", property(lambda self: EngineInfo(can_sleep=True)))
    with pytest.raises(
        ConfigError, match="engine hf sleeps while the model trains: set engine.max_staleness to 0"
    ):
        Pretrainer(build(merged(values, engine={"max_staleness": 1}))).train()


@pytest.mark.parametrize(
    ("values", "device", "tolerance"),
    [
        ({}, "cpu", 1e-3),
        ({}, "cuda", 0.05),  # .01 was measured with vLLM on an H100
        ({"engine": {"name": "vllm_local", "dtype": "bfloat16"}}, "cuda", 0.5),
        ({"model": {"path": "m", "dtype": "bfloat16"}}, "cpu", 0.5),
    ],
)
def test_the_probe_allows_what_the_arithmetic_of_the_device_rounds(values, device, tolerance):
    config = build({"model": "m", "data": "d.jsonl", "objective": "rlp"} | values)
    assert default_tolerance(config, torch.device(device)) == tolerance
