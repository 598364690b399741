"""Recomputed and offloaded activations change no number: in trees, with adapters, in torch and DeepSpeed."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from rlpretrain.config import ConfigError, LoraConfig, ModelConfig
from rlpretrain.config.io import build
from rlpretrain.models import load_model
from rlpretrain.models.adapters import add_lora
from rlpretrain.scoring import attention
from rlpretrain.scoring.attention.cpu import TreeAttention
from rlpretrain.tools.memory import Sizes, memory
from tests.builders.batches import VOCABULARY, random_batch
from tests.builders.policies import SHARDED
from tests.builders.runs import merged, trained
from tests.builders.tiny import tiny_model
from tests.builders.trees import MODELS, laid, numbers

LAYERS = 2
SAVED = {
    "recomputed": {"gradient_checkpointing": True},
    "offloaded": {"gradient_checkpointing": True, "activation_offloading": True},
}


class Recorded(torch.autograd.graph.save_on_cpu):
    """torch's own context; `shapes` are those of the tensors that went to CPU memory."""

    shapes: list[tuple[int, ...]] = []

    def __init__(self, pin_memory: bool = False):
        super().__init__(pin_memory)
        pack = self.pack_hook

        def record(tensor: torch.Tensor) -> Any:
            self.shapes.append(tuple(tensor.shape))
            return pack(tensor)

        self.pack_hook = record


def loaded(folder: Path, name: str, lora: bool = False, **settings: Any) -> Any:
    """A model from a checkpoint, as a run loads it, that attends along trees."""
    if not folder.exists():
        tiny_model(name, VOCABULARY, seed=1, initializer_range=0.2, **MODELS[name]).save_pretrained(folder)
    kernel = MODELS[name].get("attn_implementation")
    model = load_model(ModelConfig(path=str(folder), attn_implementation=kernel, **settings))
    if lora:
        torch.manual_seed(0)
        add_lora(model, LoraConfig(r=2))
    assert attention.install(model) is None
    return model


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize("settings", SAVED.values(), ids=SAVED)
@pytest.mark.parametrize("name", ["qwen3", "gpt2", "mistral", "gemma2"])
def test_trees_give_the_same_gradients(name, settings, lora, tmp_path, monkeypatch):
    """The tree passes through the recomputed layers, each of which attends once more."""
    micros = laid(random_batch(random.Random(2), 2, 2, 3, 2), tree=True)
    attend, calls = TreeAttention.forward, []
    usual, saving = loaded(tmp_path / "m", name, lora), loaded(tmp_path / "m", name, lora, **settings)
    monkeypatch.setattr(
        TreeAttention, "forward", staticmethod(lambda *args: calls.append(len(calls)) or attend(*args))
    )
    plain, grads = numbers(usual, micros)
    once = len(calls)
    monkeypatch.setattr(torch.autograd.graph, "save_on_cpu", Recorded)
    monkeypatch.setattr(Recorded, "shapes", [])
    again, same = numbers(saving, micros)
    assert len(calls) == 3 * once == 3 * LAYERS * len(micros)
    assert plain.keys() == again.keys() and all(torch.equal(plain[n], again[n]) for n in plain)
    assert grads.keys() == same.keys()
    for n, gradient in grads.items():
        torch.testing.assert_close(same[n], gradient, rtol=1e-6, atol=1e-6)
    offloaded = LAYERS if "activation_offloading" in settings else 0
    states = [(1, micro.input_ids.shape[1], 32) for micro in micros for _ in range(offloaded)]
    assert Recorded.shapes == states


BACKENDS = {
    "torch": {"backend": "torch"},
    "zero0": {"backend": "deepspeed"},
    "zero2": {"backend": "deepspeed", "zero_stage": 2},
    "zero3": {"backend": "deepspeed", "deepspeed_config": SHARDED},
}


@pytest.mark.parametrize("policy", BACKENDS.values(), ids=BACKENDS)
def test_runs_train_the_same_weights(policy, values, tmp_path):
    values = merged(values, policy=policy, max_steps=2)
    plain = trained(values, output_dir=str(tmp_path / "plain"))
    saved = merged(values, output_dir=str(tmp_path / "saved"))
    saved["model"] = {"path": values["model"], **SAVED["offloaded"]}
    for name, weight in trained(saved).items():
        torch.testing.assert_close(weight, plain[name], rtol=1e-5, atol=1e-6)


def test_offloading_needs_recomputation():
    with pytest.raises(ConfigError, match="activation_offloading.*needs.*gradient_checkpointing"):
        build({"model": {"path": "m", "activation_offloading": True}, "data": "d"})


def test_the_memory_estimate_leaves_out_what_is_in_cpu_memory():
    shape = tiny_model("qwen3", num_hidden_layers=10).config
    sizes = Sizes(
        parameters=1,
        trained=1,
        linear=0,
        ranks=1,
        backend="torch",
        stage=0,
        device="cuda",
        prompt=64,
        row=64,
        micro=256,
    )

    def activations(**settings: Any) -> float:
        config = build({"model": {"path": "m", **settings}, "data": "d", "objective": "ntp"})
        return next(i.bytes for i in memory(config, shape, sizes) if i.name == "activations")

    recomputed, offloaded = (activations(**settings) for settings in SAVED.values())
    assert recomputed - offloaded == 256 * 9 * 32 * 4  # the inputs of all layers but the one at work
    assert activations() > 3 * recomputed
