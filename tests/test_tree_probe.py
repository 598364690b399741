"""Models that trees would score wrongly show it on a few tokens; LoRA leaves out what it would break."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.architectures_sizes import random_model
from rlpretrain.compat import attention_of, backbone_of
from rlpretrain.config import LoraConfig
from rlpretrain.models.adapters import add_lora
from rlpretrain.scoring import attention
from tests.builders.tiny import tiny_model


class Neighbours(nn.Module):
    """Each token gets a part of the one before it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)


class Alone(nn.Module):
    """A layer that takes no further arguments."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        use_cache: bool = False,
        position_embeddings: Any = None,
    ) -> torch.Tensor:
        return self.layer(hidden_states, attention_mask, position_embeddings=position_embeddings)


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("nemotron", {}, "do not pass a tree on to their attention"),
        ("phimoe", {"sliding_window": 16}, "do not tell their attention its window"),
        ("phimoe", {"sliding_window": None}, None),
        ("phimoe", {"sliding_window": 256}, None),
        ("recurrent_gemma", {}, "mix outside attention"),
        ("mistral", {}, None),
        ("deepseek_v3", {}, None),
    ],
)
def test_a_model_says_why_it_has_no_trees(name, changes, reason):
    model = random_model(name, 64, **changes).train()
    before = attention_of(model)
    found = attention.install(model)
    assert (found is None) if reason is None else reason in found
    assert attention_of(model) == (before if reason else f"tree_{before}")
    assert all(module.training for module in model.modules())


def test_a_model_of_ones_own_says_why_it_has_no_trees():
    model = tiny_model("llama", 64)
    model.model.layers[0].mlp = nn.Sequential(Neighbours(), model.model.layers[0].mlp)
    assert "mix outside attention" in (attention.install(model) or "")
    assert "mix outside attention" in (attention.install(model.to(torch.bfloat16)) or "")
    model = tiny_model("llama", 64)
    model.model.layers[1] = Alone(model.model.layers[1])
    assert "takes no tree" in (attention.install(model) or "")


def test_a_row_too_short_for_the_probe_is_no_reason():
    assert attention.install(tiny_model("gpt2", 64, n_positions=8)) is None


def test_a_prefix_that_a_class_does_not_have():
    model = random_model("llama4_text", 64)
    assert backbone_of(model) is model.model
    with pytest.raises(ValueError, match="no separate backbone"):
        backbone_of(Whole())


class Whole(nn.Module):
    """A model without parts."""

    @property
    def base_model(self) -> Any:
        return self


@pytest.mark.parametrize(
    ("name", "without", "adapted"),
    [
        ("falcon_h1", "mamba.out_proj", "mamba.in_proj"),
        ("nemotron_h", "mixer.out_proj", "mixer.in_proj"),
        ("bamba", "mamba.out_proj", "mamba.in_proj"),
        ("phimoe", "mlp.router", "self_attn.q_proj"),
        ("qwen3_next", "lm_head", "linear_attn.out_proj"),
        ("falcon", "lm_head", "query_key_value"),
    ],
)
def test_all_linear_leaves_out_what_an_adapter_would_break(name, without, adapted):
    model = random_model(name, 64)
    inputs = torch.arange(3, 12)[None]
    before = model(input_ids=inputs).logits
    add_lora(model, LoraConfig(r=2))
    has = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert not any(name.endswith(without) for name in has)
    assert any(name.endswith(adapted) for name in has)
    torch.testing.assert_close(model(input_ids=inputs).logits, before)
    model(input_ids=inputs).logits.logsumexp(-1).sum().backward()
    outputs = [p for name, p in model.named_parameters() if "lora_B" in name]
    assert all(p.grad is not None and p.grad.any() for p in outputs)


def test_layers_named_by_the_user_are_taken_as_they_are():
    model = random_model("bamba", 64)
    add_lora(model, LoraConfig(r=2, target_modules=("mamba.out_proj",)))
    assert any(hasattr(module, "lora_A") for name, module in model.named_modules() if "out_proj" in name)
