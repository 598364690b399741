"""`rlpretrain train --dry-run`: offline, without weights, and exact where it can be."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from rlpretrain.cli import main
from rlpretrain.config import ConfigError, LoraConfig
from rlpretrain.config.io import build, load_config, read_mapping
from rlpretrain.experiments.loading import load_experiment
from rlpretrain.experiments.ratio_grid import load_grid
from rlpretrain.objectives import parse_section
from rlpretrain.tools.dry_run import dry_run, make_objective, model_shape
from rlpretrain.tools.memory import LIBRARIES, Item, Sizes, memory, peak
from rlpretrain.tools.parameter_counts import count_by_shape
from rlpretrain.tools.sizes import make_sizes
from tests.builders.configs import written
from tests.builders.runs import merged
from tests.builders.tiny import tiny_model

EXAMPLES = Path(__file__).parents[1] / "examples"
QWEN = EXAMPLES / "qwen3_1p7b_rlp.yaml"
PARAMETERS = 1_720_574_976
"""Qwen3-1.7B: 151936·2048 embeddings, tied; 28 layers of 50,336,000; 2048 in the last norm."""


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that is tried fails the test."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError(f"the network was used: {args[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def planned(values: dict[str, Any] | None = None, *overrides: str) -> dict[str, Item]:
    """The memory of a configuration by name of the part; the Qwen recipe by default."""
    config = load_config(QWEN, overrides) if values is None else build(values)
    shape, _ = model_shape(config.model, EXAMPLES)
    return {
        i.name: i for i in memory(config, shape, make_sizes(config, make_objective(config, []), shape, []))
    }


def test_the_papers_recipe_resolves_offline(offline: None, capsys: pytest.CaptureFixture[str]):
    assert main(["train", str(QWEN), "--dry-run"]) == 0
    said = capsys.readouterr().out
    for expected in (
        f"{PARAMETERS:,}",
        "baseline ema",
        "keys and values",
        "peak",
        "102,400 in all",
        "1.00e-06 (step 200)",
    ):
        assert expected in said
    config = load_config(QWEN)
    assert (config.sampling.thoughts, config.sampling.temperature, config.sampling.max_thought_tokens) == (
        16,
        0.7,
        2048,
    )
    assert (config.baseline.name, config.baseline.decay) == ("ema", 0.999)
    assert (config.optim.lr, config.optim.schedule, config.positions_per_step) == (1e-6, "constant", 512)
    assert (config.loss.ntp_coef, config.loss.reader_coef, config.data.max_length) == (0.0, 0.0, 2048)


def test_parameters_are_counted_exactly_and_tied_ones_once(corpus: Path):
    counts = count_by_shape(AutoConfig.from_pretrained(EXAMPLES / "qwen3_1p7b"))
    assert (counts.all, counts.trained) == (PARAMETERS, PARAMETERS)
    built = tiny_model("llama")
    whole = sum(p.numel() for p in built.parameters())
    counts = count_by_shape(built.config)
    assert (counts.all, counts.trained) == (whole, whole)
    lora = LoraConfig(r=3, target_modules=("q_proj",))
    adapters = 2 * 3 * (built.config.hidden_size + built.config.hidden_size)  # two layers
    counts = count_by_shape(built.config, lora=lora)
    assert (counts.all, counts.trained) == (whole + adapters, adapters)


def test_memory_adds_up(monkeypatch: pytest.MonkeyPatch):
    one = planned()
    p = PARAMETERS
    sizes = {
        "weights": 2 * p,
        "gradients": 4 * p,
        "AdamW's two moments": 8 * p,
        "fp32 master weights": 4 * p,
        "baseline ema": 4 * p,
        "initial model": 2 * p,
    }
    sizes["Python and libraries"] = LIBRARIES
    assert {name: one[name].bytes for name in sizes} == sizes
    assert {name for name, item in one.items() if item.when == "always"} == set(sizes)
    rows = {when: sum(i.bytes for i in one.values() if i.when == when) for when in ("training", "sampling")}
    assert peak(list(one.values())) == 24 * p + LIBRARIES + max(rows.values())

    monkeypatch.setenv("WORLD_SIZE", "8")
    eight = planned()
    sharded = {n for n in one if one[n].bytes != eight[n].bytes}
    assert sharded == {"AdamW's two moments", "fp32 master weights"}  # ZeRO 1
    assert eight["AdamW's two moments"].bytes == p
    whole = planned(None, "--policy.zero_stage", "3")
    assert whole["weights"].bytes == p / 4 and whole["engine's own weights"].bytes == 2 * p


def test_lora_and_the_engine_count():
    lora = planned(None, "--policy.lora", '{"r": 8, "target_modules": ["q_proj", "v_proj"]}')
    adapters = 28 * 8 * (2048 + 2048 + 2048 + 1024)
    assert lora["AdamW's two moments"].bytes == 8 * adapters and lora["weights"].bytes == 2 * (
        PARAMETERS + adapters
    )
    hf, vllm, servers = (
        planned(None, "--engine", json.dumps(e))
        for e in (
            {"name": "hf", "max_staleness": 1},
            {"name": "vllm_local", "kv_cache_gib": 2, "dtype": "float32"},
            {"name": "vllm_server", "urls": ["http://x"]},
        )
    )
    assert (
        hf["engine's own weights"].bytes == 2 * PARAMETERS
        and vllm["engine's own weights"].bytes == 4 * PARAMETERS
    )
    assert vllm["keys and values"].bytes == 2 << 30 and "logits of sampling" not in vllm
    assert not {"engine's own weights", "keys and values"} & servers.keys()
    merged, adapter = (
        planned(None, "--engine.name", "vllm_local", "--policy.lora", json.dumps({"r": 8, "sync": sync}))
        for sync in ("merged", "adapter")
    )
    assert merged["merged weights of a sync"].bytes == merged["weights"].bytes
    assert "merged weights of a sync" not in adapter.keys() | vllm.keys()


def test_plain_settings_cost_no_copies():
    lean = planned(
        None,
        "--baseline.name",
        "self",
        "--baseline.frozen_every",
        "0",
        "--model.gradient_checkpointing",
        "false",
    )
    assert not {"baseline ema", "initial model"} & lean.keys()
    assert lean["activations"].bytes > 5 * planned()["activations"].bytes


def test_activations_are_close_to_what_autograd_keeps():
    model = tiny_model(
        "qwen3", hidden_size=64, intermediate_size=192, head_dim=16, num_key_value_heads=2, vocab_size=32
    )
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        hidden = model.base_model(
            input_ids=torch.ones(4, 64, dtype=torch.long), use_cache=False
        ).last_hidden_state
    found = sum(s.nbytes() for s in kept.values())
    config = build({"model": "here", "data": "docs.jsonl", "token_budget": 256, "objective": "ntp"})
    sizes = Sizes(
        parameters=1,
        trained=1,
        linear=0,
        ranks=1,
        backend="torch",
        stage=0,
        device="cpu",
        prompt=64,
        row=64,
        micro=256,
    )
    said = next(i.bytes for i in memory(config, model.config, sizes) if i.name == "activations")
    assert hidden.requires_grad and 0.8 < said / found < 1.25


def test_tiles_of_logits_are_no_larger_than_a_micro_batch():
    config, model = load_config(QWEN), tiny_model("qwen3", vocab_size=300)
    shape = dict(parameters=1, trained=1, linear=0, ranks=1, backend="torch", stage=0, prompt=8, row=8)

    def head(device: str, micro: int) -> float:
        items = memory(config, model.config, Sizes(device=device, micro=micro, **shape))
        return next(i.bytes for i in items if i.name == "head and its loss")

    gradient = 2 * 300 * model.config.hidden_size
    assert head("cuda", 50) == 2 * 50 * 300 * 2 + gradient
    assert head("cuda", 20_000) == 2 * 8192 * 300 * 2 + gradient
    assert head("cpu", 50) == 2 * 50 * 300 * 4 + gradient


def test_a_local_model_and_file_are_read(
    values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    values = merged(values, epochs=2, max_steps=None, optim__schedule="cosine")
    assert main(["train", written(values, tmp_path), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "│ 100 " in said and "200: 2 epochs" in said  # 2 epochs of 200 documents, 4 a step
    assert "note" not in said
    assert not (tmp_path / "run").exists()


def test_plain_next_token_prediction_needs_no_engine(values: dict[str, Any]):
    found = planned(merged(values, objective="ntp"))
    assert "keys and values" not in found and "initial model" not in found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optim__learning_rate": 1e-6}, "unknown key 'optim.learning_rate'"),
        ({"objective__target_lenght": 2}, "did you mean 'target_length'?"),
        ({"objective__positions": "sentense"}, "did you mean 'sentence'?"),
        ({"objective__template": "no place for the context"}, "{context}"),
        ({"sampling__thoughts": 1}, "at least 2 thoughts"),
        ({"data__path": "missing.jsonl"}, "no such file or folder: missing.jsonl"),
        ({"eval__data": "missing.jsonl"}, "no such file or folder: missing.jsonl"),
        ({"data__column": "body"}, "has no column 'body'"),
        ({"policy__zero_stage": 2}, "need policy.backend deepspeed"),
        ({"sampling__max_thought_tokens": 9000}, "256 positions"),
        ({"data__streaming": True, "max_steps": None}, "give max_steps"),
        ({"model": {"path": "nobody/nothing", "config_beside": "nowhere"}}, "config.json"),
    ],
)
def test_what_a_run_would_refuse_is_refused(
    values: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, Any],
    message: str,
):
    assert main(["train", written(merged(values, **change), tmp_path), "--dry-run"]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_without_weights_is_for_training_from_scratch(
    values: dict[str, Any], corpus: Path, tmp_path: Path
):
    with pytest.raises(ConfigError, match="no weights"):
        dry_run(build(merged(values, model=str(corpus / "model"))), tmp_path)
    assert (
        dry_run(build(merged(values, model={"path": str(corpus / "model"), "from_scratch": True})), tmp_path)
        == 0
    )


def test_positions_divide_over_the_ranks(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match="does not divide over 3 ranks"):
        dry_run(build(values), tmp_path)


RECIPES = sorted(file for file in EXAMPLES.rglob("*.yaml") if file.stem != "skypilot")  # that is SkyPilot's


@pytest.mark.parametrize("file", RECIPES, ids=lambda f: f.stem)
def test_every_example_parses(file: Path):
    if "methods" in read_mapping(file):
        load_experiment(file)
    elif "ratios" in read_mapping(file):
        load_grid(file)
    else:
        parse_section(load_config(file).objective)
