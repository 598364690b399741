"""LoRA: only adapters train, engines get them merged or alone, checkpoints and saved models are ordinary
ones.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlpretrain.config import ConfigError, LoraConfig
from rlpretrain.config.io import build
from rlpretrain.corpora import dial
from rlpretrain.models.adapters import adapter_pieces, add_lora, check, pieces, plain_copy
from rlpretrain.training.pretrainer import Pretrainer
from tests.builders.engines import SHAPE, rows_of
from tests.builders.policies import SHARDED
from tests.builders.runs import launch, merged, same, trained, weights
from tests.builders.tiny import tiny_model

peft = pytest.importorskip("peft", reason="needs PEFT: make env LOCK=test-cpu")
LORA = {"r": 4, "alpha": 16, "target_modules": ("q_proj", "v_proj", "down_proj")}
IDS = torch.arange(3, 20)[None]


def with_lora(family: str, **settings):
    """A model with adapters that do something, and its untouched twin."""
    plain = tiny_model(family, 40, initializer_range=0.3)
    model = add_lora(tiny_model(family, 40, initializer_range=0.3), LoraConfig(**settings))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".lora_B." in name:
                p.normal_(std=0.2)
    return model, plain


@pytest.mark.parametrize("family", ["qwen3", "llama", "gpt2"])
def test_merged_weights_compute_what_the_adapters_do(family):
    model, plain = with_lora(family, r=4)
    parameters = dict(model.named_parameters())
    assert {n for n, p in parameters.items() if p.requires_grad} == {n for n in parameters if ".lora_" in n}
    found = {piece.name: piece.make() for piece in pieces(model)}
    assert found.keys() == dict(plain.named_parameters(remove_duplicate=False)).keys()
    assert (model(IDS).logits - plain(IDS).logits).abs().max() > 0.1
    plain.load_state_dict(found)
    torch.testing.assert_close(plain(IDS).logits, model(IDS).logits, atol=1e-4, rtol=1e-4)


def test_a_plain_copy_has_the_base_and_no_adapters():
    model, plain = with_lora("qwen3", r=4)
    twin = plain_copy(model)
    assert same(dict(twin.named_parameters()), dict(plain.named_parameters()))
    assert not any(p.requires_grad for p in twin.parameters())
    assert (model(IDS).logits - twin(IDS).logits).abs().max() > 0.1  # the model kept its own


def test_peft_reads_the_adapter_as_one_of_its_own(values, tmp_path):
    run = merged(values, policy={"lora": LORA}, max_steps=2, optim__lr=1e-2)
    trained(run)
    adapted = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(run["model"]), tmp_path / "run" / "adapter"
    )
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    torch.testing.assert_close(adapted.merge_and_unload()(IDS).logits, ours(IDS).logits, atol=1e-4, rtol=1e-4)
    changed = {
        n
        for n, p in weights(tmp_path / "run" / "model").items()
        if not torch.equal(p, weights(Path(run["model"]))[n])
    }
    assert changed and all(any(t in n for t in LORA["target_modules"]) for n in changed)


def test_resume_is_bit_identical(values, tmp_path):
    run = merged(values, policy={"lora": LORA}, optim__lr=1e-2, checkpoint={"every": 2})
    whole = trained(run, max_steps=4, output_dir=str(tmp_path / "whole"))
    trained(run, max_steps=2)
    assert same(trained(run, resume="auto", max_steps=4), whole)


def test_layers_that_are_not_there(values):
    with pytest.raises(ConfigError, match="policy.lora.target_modules .*nonsense"):
        Pretrainer(build(merged(values, policy={"lora": {"target_modules": ["nonsense"]}}))).train()
    with pytest.raises(ConfigError, match="policy.lora.sync: adapter is for engine vllm_local"):
        Pretrainer(build(merged(values, policy={"lora": {"sync": "adapter"}}))).train()


def test_an_adapter_on_a_gpu_needs_half_precision(values):
    """vLLM's kernels for adapters assert it in the middle of a run; on a CPU they take float32."""
    run = merged(values, policy={"lora": {"sync": "adapter"}}, engine={"name": "vllm_local"}, device="cuda")
    with pytest.raises(ConfigError, match="half precision on a GPU.*engine.dtype to bfloat16"):
        check(build(run))
    for changes in (
        {"engine__dtype": "bfloat16"},
        {"model": {"path": "x", "dtype": "float16"}},
        {"device": "cpu"},
    ):
        check(build(merged(run, **changes)))


def test_the_adapter_pieces_are_half_of_nothing_else():
    model, _ = with_lora("qwen3", r=4)
    names = [piece.name for piece in adapter_pieces(model)]
    assert len(names) == 2 * 7 * 2 and all(n.startswith("base_model.model.model.layers.") for n in names)
    assert all(n.endswith((".lora_A.weight", ".lora_B.weight")) for n in names)


# with vLLM


@pytest.fixture
def run(values, tmp_path):
    pytest.importorskip("vllm", reason="needs the CPU build of vLLM: make env LOCK=test-cpu")
    tiny_model("qwen3", len(dial.WORDS), **SHAPE).save_pretrained(tmp_path / "base")
    dial.tokenizer().save_pretrained(tmp_path / "base")
    return merged(
        values,
        model=str(tmp_path / "base"),
        optim__lr=1e-2,
        max_steps=4,
        engine={"name": "vllm_local", "kv_cache_gib": 0.05, "batch_size": 32},
    )


@pytest.mark.slow
@pytest.mark.parametrize("sync", ["merged", "adapter"])
def test_vllm_samples_from_the_adapters_that_are_trained(run, tmp_path, sync):
    trained(run, policy={"lora": LORA | {"sync": sync}})
    rows = rows_of(tmp_path / "run")
    assert len(rows) == 4 and all(row["sampling/probe_difference"] <= 1e-4 for row in rows)
    assert all(row["sampling/abs_log_ratio_max"] <= 1e-4 for row in rows)
    assert not same(weights(tmp_path / "run" / "model"), weights(Path(run["model"])))


@pytest.mark.slow
def test_an_adapter_that_loses_a_tensor_is_found_by_the_probe(run, monkeypatch):
    from rlpretrain.training.backends.torch import TorchPolicy
    from rollout.probe import StaleWeights

    whole = TorchPolicy.adapter
    steps = []

    def lossy(self):
        steps.append(1)
        for name, tensor in whole(self):
            yield (
                name,
                torch.zeros_like(tensor)
                if len(steps) > 2 and "layers.1.mlp.down_proj.lora_B" in name
                else tensor,
            )

    monkeypatch.setattr(TorchPolicy, "adapter", lossy)
    with pytest.raises(StaleWeights, match="after the sync of version 2"):
        trained(run, policy={"backend": "torch", "lora": LORA | {"sync": "adapter"}})


@pytest.mark.slow
def test_zero_3_on_two_ranks_hands_over_merged_weights(values, tmp_path):
    run = merged(values, optim__lr=1e-2, max_steps=2, policy={"lora": LORA, "backend": "deepspeed"})
    one = trained(run, output_dir=str(tmp_path / "one"), policy={"lora": LORA, "backend": "torch"})
    launch(
        [{"config": merged(run, policy__deepspeed_config=SHARDED, output_dir=str(tmp_path / "two"))}],
        tmp_path,
    )
    two = weights(tmp_path / "two" / "model")
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-4, rtol=1e-3)
    assert json.loads((tmp_path / "two" / "run.json").read_text())["ranks"] == 2
