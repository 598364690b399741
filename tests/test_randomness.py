"""Nothing in a forward is random, in the mode that a model is trained in: over architectures, adapters and
TRL (issue 15.2).
"""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rlpretrain.compat import attention_of
from rlpretrain.config import ConfigError, LoraConfig, ModelConfig
from rlpretrain.models import load_model
from rlpretrain.models.randomness import check_deterministic, in_mode, switch_off
from rlpretrain.scoring.packing import Layout, count, pack
from rlpretrain.scoring.scorer import Scorer, score
from tests.builders.architectures import MORE, SHAPE
from tests.builders.batches import VOCABULARY, random_batch
from tests.builders.tiny import ARCHITECTURES, tiny_model, word_tokenizer

RATES = {
    **dict.fromkeys(
        ["dropout", "attention_dropout", "hidden_dropout", "activation_dropout", "layerdrop"], 0.3
    ),
    **dict.fromkeys(
        ["resid_pdrop", "attn_pdrop", "embd_pdrop", "residual_dropout", "embedding_dropout"], 0.3
    ),
    **dict.fromkeys(["router_jitter_noise", "input_jitter_noise"], 0.2),
}


def with_rates(name: str, folder: Path) -> Path:
    """A checkpoint in which everything is on that its configuration knows."""
    fields = {**({**SHAPE, **MORE[name]} if name in MORE else {**SHAPE, **ARCHITECTURES[name]})}
    known = AutoConfig.for_model(name).to_dict()
    rates = {k: v for k, v in RATES.items() if k in known}
    config = AutoConfig.for_model(name, **fields, **rates)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def scored(model: Any) -> torch.Tensor:
    """All log-probs of a micro-batch as training sees them, with their gradient graph."""
    batch = random_batch(random.Random(1), documents=2, positions=1)
    (micro,) = pack(batch, Layout(10_000, cut="force_close"), count(batch, "force_close"))
    scores = score(Scorer(model), micro)
    parts = (scores.thought_logps, scores.target_logps, scores.trunk_logps)
    return torch.cat([p.flatten() for p in parts])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", [*ARCHITECTURES, *MORE])
def test_two_forwards_of_the_training_model_are_bit_identical(name, checkpointing, tmp_path):
    folder = with_rates(name, tmp_path)
    model = load_model(ModelConfig(path=str(folder), gradient_checkpointing=checkpointing))
    check_deterministic(model)
    first, second = scored(model), scored(model)
    assert torch.equal(first, second)
    form: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": attention_of(model)}
    plain = AutoModelForCausalLM.from_pretrained(folder, **form).eval()
    assert torch.equal(first, scored(plain))  # what thoughts are sampled with, and the base itself


@pytest.mark.parametrize("name", ["opt", "gpt2", "gpt_neox", "llama", "falcon", "phimoe"])
def test_gradients_under_checkpointing_are_those_without(name, tmp_path):
    """And the layers are recomputed: each runs once more in backward."""
    folder = with_rates(name, tmp_path)
    found, runs = [], []
    for checkpointing in (False, True):
        model = load_model(ModelConfig(path=str(folder), gradient_checkpointing=checkpointing))
        norm = next(m for n, m in model.named_modules() if re.search(r"\.0\.(\w*norm|ln_1)", n))
        seen: list[bool] = []
        norm.register_forward_hook(lambda *_, seen=seen, norm=norm: seen.append(norm.training))
        scored(model).sum().backward()
        runs.append(seen)
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert runs == [[False], [False, False]]
    for n, grad in found[0].items():
        torch.testing.assert_close(found[1][n], grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["opt", "gpt2", "gpt_neox", "llama", "mixtral", "gptj", "phimoe", "falcon"])
def test_in_somebody_elses_trainer_all_is_off_or_refused_by_name(name, tmp_path):
    """As TRL's trainers do: the whole model is put into training mode. `ObjectiveReward.watch` asks for
    both before.
    """
    model = AutoModelForCausalLM.from_pretrained(with_rates(name, tmp_path), dtype=torch.float32).eval()
    sampled = scored(model)
    model.train()
    with pytest.raises(ConfigError, match="draws random numbers"):
        check_deterministic(model)
    off = switch_off(model)
    if name in (
        "phimoe",
        "falcon",
    ):  # a router that draws whatever its noise is; layers that read the configuration
        with pytest.raises(ConfigError, match=f"{type(model).__name__} draws random numbers.*dropout 0.3"):
            check_deterministic(model)
        return
    assert off
    check_deterministic(model)
    assert torch.equal(scored(model), sampled)


def test_adapters_of_other_peoples_trainers_lose_their_dropout_too():
    """PEFT's own dropout, as TRL's users set it: `trl.ObjectiveReward.watch` calls this on the model
    inside.
    """
    import peft

    torch.manual_seed(0)
    wrapped = peft.get_peft_model(
        tiny_model("llama", VOCABULARY), peft.LoraConfig(r=4, lora_dropout=0.4, task_type="CAUSAL_LM")
    )
    model = wrapped.get_base_model()
    for n, p in model.named_parameters():
        if "lora_B" in n:
            torch.nn.init.normal_(p)
    with in_mode(model, training=True):
        with pytest.raises(ConfigError, match="draws random numbers"):
            check_deterministic(model)
        assert switch_off(model) == ["Dropout 0.4"]
        check_deterministic(model)
        assert torch.equal(scored(model), scored(model))


def test_a_reward_function_of_trl_settles_the_model_that_it_watches():
    """Dropout of the trainer's model is off before training begins, and a kernel that drops a soft cap is
    left.
    """
    from rlpretrain.trl import InformationGainReward

    for name, fields in {
        "gpt2": {"attn_pdrop": 0.3, "resid_pdrop": 0.3},
        "gemma2": {"attn_logit_softcapping": 0.5},
    }.items():
        model, tokenizer = tiny_model(name, VOCABULARY, **fields), word_tokenizer(["a", "b"])
        reward = InformationGainReward(model, tokenizer)
        model.train()
        told = "Dropout 0.3" if name == "gpt2" else "attends by eager.*soft cap"
        with pytest.warns(UserWarning, match=told):
            reward.watch(model)
        assert model.training and attention_of(model).endswith("eager" if name == "gemma2" else "sdpa")
        assert torch.equal(scored(model), scored(model))


def test_our_own_adapters_under_checkpointing(tmp_path):
    from rlpretrain.models.adapters import add_lora

    model = load_model(ModelConfig(path=str(with_rates("opt", tmp_path)), gradient_checkpointing=True))
    add_lora(model, LoraConfig(r=2))
    assert torch.equal(scored(model), scored(model))


class Noisy(torch.nn.Module):
    """Noise that no field names."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 0.1 * torch.randn_like(x) if self.training else x


def test_what_cannot_be_switched_off_is_refused_by_name():
    model = tiny_model("llama", VOCABULARY)
    model.model.layers[0].mlp = torch.nn.Sequential(model.model.layers[0].mlp, Noisy())
    model.eval()
    check_deterministic(model)  # asked in the mode that it will be used in
    model.train()
    assert switch_off(model) == []
    state = torch.get_rng_state()
    with pytest.raises(ConfigError, match="LlamaForCausalLM draws random numbers.*attention_dropout 0"):
        check_deterministic(model)
    assert torch.equal(state, torch.get_rng_state())
