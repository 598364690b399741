"""The loss that keeps the experts of a mixture evenly used."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.architectures_sizes import random_model
from rlpretrain import Pretrainer
from rlpretrain.config import ConfigError
from rlpretrain.config.io import build
from rlpretrain.models.routers import balance_loss, experts_per_token
from rlpretrain.scoring import attention
from rlpretrain.scoring.packing import Layout, count, pack
from rlpretrain.scoring.scorer import Scorer, score
from rlpretrain.types import Batch
from tests.builders.batches import VOCABULARY, random_batch
from tests.builders.runs import merged

MIXTURES = ("qwen3_moe", "mixtral", "olmoe", "granitemoe", "gpt_oss", "qwen3_next")


def test_evenly_used_experts_give_their_number_for_each_token():
    logits = torch.eye(4).repeat(6, 1) * 9 + torch.eye(4).roll(1, 1).repeat(6, 1) * 8
    assert float(balance_loss([logits], 2, torch.ones(24))) == pytest.approx(2.0)
    one_sided = torch.tensor([[50.0, 40.0, 0.0, 0.0]]).repeat(24, 1)
    assert float(balance_loss([one_sided], 2, torch.ones(24))) == pytest.approx(4.0, abs=1e-3)


def test_padding_does_not_count():
    logits = torch.randn(3, 8, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(3, 8)
    mask[:, :5] = 1
    whole = balance_loss([logits, logits + 1], 2, mask)
    torch.testing.assert_close(whole, balance_loss([logits[:, :5]] * 2, 2, torch.ones(15)))


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("tree", [True, False])
def test_it_is_the_loss_that_transformers_gives(name, tree):
    model = random_model(name, VOCABULARY)
    tree = tree and attention.install(model) is None
    batch = Batch((), random_batch(random.Random(0), documents=1, positions=1).documents)
    (micro,) = pack(batch, Layout(10_000, tree=tree), count(batch, "mask"))
    scorer = Scorer(model)
    scorer.experts = experts_per_token(model)
    found = score(scorer, micro).balance
    ids = micro.input_ids
    wanted = model(input_ids=ids, attention_mask=torch.ones_like(ids), output_router_logits=True).aux_loss
    torch.testing.assert_close(found, wanted)
    with torch.no_grad():
        assert score(scorer, micro).balance is None


def test_in_a_tree_each_token_counts_once():
    model = random_model("qwen3_moe", VOCABULARY)
    assert attention.install(model) is None
    batch = random_batch(random.Random(0), documents=1, positions=2)
    (micro,) = pack(batch, Layout(10_000, cut="force_close", tree=True), count(batch, "force_close"))
    scorer, routers = Scorer(model), []
    scorer.experts = 2
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda module, args, out: routers.append(out[0].detach()))
    balance = score(scorer, micro).balance
    assert all(len(logits) == micro.input_ids.numel() == micro.tree.size for logits in routers)
    torch.testing.assert_close(balance, balance_loss(routers, 2, torch.ones(micro.tree.size)))
    balance.backward()
    assert all(layer.mlp.gate.weight.grad.any() for layer in model.model.layers)


def trained(corpus: Path, folder: Path, coefficient: float, **changes: Any) -> tuple[list[Any], Any]:
    """The log of a run of a mixture from scratch, and its gates."""
    tokenizer = AutoTokenizer.from_pretrained(corpus / "base")
    base = folder / "mixture"
    model = random_model("qwen3_moe", len(tokenizer))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight[0] += 1.0  # the first expert is chosen by tokens whose states are positive
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    values = {
        "model": {"path": str(base)},
        "data": {"path": str(corpus / "train.jsonl"), "max_length": 64},
        "objective": {"name": "rlp", "target_length": 4},
        "sampling": {"thoughts": 2, "max_thought_tokens": 4},
        "positions_per_step": 4,
        "loss": {"router_coef": coefficient},
        "optim": {"lr": 3e-3, "warmup_steps": 0},
        "checkpoint": {"every": 0},
        "max_steps": 6,
        "threads": 1,
        "output_dir": str(folder / "run"),
    }
    Pretrainer(build(merged(values, **changes))).train()
    log = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return log, AutoModelForCausalLM.from_pretrained(folder / "run" / "model")


def test_a_run_evens_out_its_experts(corpus, tmp_path):
    log, model = trained(corpus, tmp_path, 3.0)
    balance = [row["router/balance"] for row in log]
    assert len(balance) == 6 and min(balance) > 1.9
    (tmp_path / "without").mkdir()
    log, other = trained(corpus, tmp_path / "without", 0.0)
    assert not any("router/balance" in row for row in log)
    texts = [json.loads(line)["text"] for line in (corpus / "train.jsonl").read_text().splitlines()[:20]]
    tokenizer = AutoTokenizer.from_pretrained(corpus / "base")
    ids = torch.tensor(tokenizer(" ".join(texts))["input_ids"][:200])[None]
    even, uneven = (m(input_ids=ids, output_router_logits=True).aux_loss for m in (model, other))
    assert even < uneven - 0.1


@pytest.mark.parametrize(
    "changes",
    [
        {"model__gradient_checkpointing": True},
        {"policy": {"backend": "deepspeed", "zero_stage": 0}},
        {"policy": {"backend": "fsdp"}},
    ],
)
def test_backends_and_recomputed_layers_agree(corpus, tmp_path, changes):
    folders = [tmp_path / "plain", tmp_path / "other"]
    logs = []
    for folder, more in zip(folders, ({}, changes), strict=True):
        folder.mkdir()
        logs.append(trained(corpus, folder, 3.0, max_steps=2, **more)[0])
    for one, other in zip(*logs, strict=True):
        assert other["router/balance"] == pytest.approx(one["router/balance"], abs=1e-4)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)


def test_a_model_without_experts_is_refused(values):
    with pytest.raises(ConfigError, match="loss.router_coef: Qwen3ForCausalLM is no mixture of experts"):
        Pretrainer(build(merged(values, loss__router_coef=0.01))).train()
