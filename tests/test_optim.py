"""Optimizers by name: what they do to which weights, with which backend, and what is refused early."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rlpretrain.config import ConfigError
from rlpretrain.config.io import build
from rlpretrain.models import load_with_tokenizer
from rlpretrain.objectives.rlp import RLP
from rlpretrain.training.optim import check_optimizer, groups_for, make_optimizer
from rlpretrain.training.planning import check_settings
from tests.builders.policies import SHARDED
from tests.builders.runs import merged, same, trained, weights

OPTIONS = {
    "sgd": {"momentum": 0.9},
    "adafactor": {},
    "muon": {"momentum": 0.9},
    # small tensors would have float32 state
    "adamw_8bit": {"min_8bit_size": 16},
    "lion_8bit": {"min_8bit_size": 16},
}


def optim(name: str) -> dict[str, Any]:
    return {"optim__name": name, "optim__options": OPTIONS[name], "optim__lr": 1e-3}


def deepspeed(stage: int) -> dict[str, Any]:
    own = {"deepspeed_config": SHARDED} if stage == 3 else {"zero_stage": stage}
    return {"policy": {"backend": "deepspeed", **own}}


def resumed(values: dict[str, Any], tmp_path: Path, **changes: Any) -> tuple[dict, dict]:
    """The weights of a run of 4 steps, and those of the same run resumed from its checkpoint 2."""
    run = merged(values, max_steps=4, checkpoint__every=2, objective="ntp", **changes)
    whole = trained(run, output_dir=str(tmp_path / "whole"))
    (tmp_path / "parts").mkdir()
    (tmp_path / "whole" / "checkpoint-2").rename(tmp_path / "parts" / "checkpoint-2")
    return whole, trained(run, resume="auto", output_dir=str(tmp_path / "parts"))


@pytest.mark.parametrize("name", OPTIONS)
def test_a_run_is_resumed_bit_identically(values, tmp_path, name):
    whole, again = resumed(values, tmp_path, **optim(name))
    assert same(whole, again)
    start = weights(Path(values["model"]))
    assert all(bool(torch.isfinite(whole[n]).all()) and not torch.equal(whole[n], start[n]) for n in start)


@pytest.mark.parametrize(
    ("name", "stage"), [("sgd", 2), ("muon", 0), ("adamw_8bit", 0), ("adamw_8bit", 1), ("adamw_8bit", 3)]
)
def test_deepspeed_trains_like_torch_and_resumes(values, tmp_path, name, stage):
    torch_run = merged(values, max_steps=4, objective="ntp", output_dir=str(tmp_path / "torch"))
    ours = trained(torch_run, **optim(name))
    whole, again = resumed(values, tmp_path, **optim(name), **deepspeed(stage))
    assert same(whole, again)
    # 8-bit state is rounded in blocks, which lie elsewhere in flat weights
    assert same(whole, ours, within=1e-3 if stage and name == "adamw_8bit" else 2e-5)


def test_muon_trains_the_matrices_of_the_body_and_adamw_the_rest(values):
    """Against the two optimizers of torch, each with its own copy of the weights."""
    config = build(merged(values, optim__name="muon", optim__lr=1e-2, optim__weight_decay=0.1))
    model, _, _ = load_with_tokenizer(config.model, None, 0)
    other, _, _ = load_with_tokenizer(config.model, None, 0)
    body = {n: p for n, p in other.named_parameters() if p.ndim == 2 and "layers" in n}
    assert 0 < len(body) < len(dict(other.named_parameters()))
    tables = [p for n, p in other.named_parameters() if p.ndim == 2 and n not in body]
    vectors = [p for p in other.parameters() if p.ndim < 2]
    muon = torch.optim.Muon(body.values(), lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(
        [{"params": tables, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=1e-2,
        betas=(0.9, 0.95),
        fused=True,
    )
    ours = make_optimizer(groups_for(model, config.optim), config.optim)
    for step in range(3):
        for n, p in model.named_parameters():
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            other.get_parameter(n).grad = p.grad.clone()
        ours.step(), muon.step(), adamw.step()
    for n, p in model.named_parameters():
        assert torch.equal(p, other.get_parameter(n)), n


def test_eight_bit_state_has_eight_bits(values):
    config = build(merged(values, **optim("adamw_8bit"))).optim
    weight = torch.nn.Parameter(torch.ones(64, 64))
    weight.grad = torch.ones(64, 64)
    optimizer = make_optimizer([{"params": [weight], "weight_decay": 0.0}], config)
    optimizer.step()
    assert optimizer.state[weight]["state1"].dtype == torch.uint8


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"name": "adamww"}, "no 'adamww'; did you mean 'adamw'"),
        ({"name": "lbfgs"}, "optim.name: no 'lbfgs'"),
        ({"name": "sgd", "options": {"momentun": 0.9}}, "no such argument; did you mean 'momentum'"),
        ({"name": "sgd", "options": {"lr": 0.9}}, "set optim.lr instead"),
        ({"name": "sgd", "options": {"momentum": -1}}, "sgd cannot be made: Invalid momentum"),
        ({"name": "sgd", "betas": (0.9, 0.99)}, "optim.betas: sgd has none"),
        ({"name": "rprop", "weight_decay": 0.1}, "optim.weight_decay: rprop has none"),
        ({"name": "muon", "options": {"ns_step": 3}}, "did you mean 'ns_steps'"),
        ({"name": "muon", "options": {"adjust_lr_fn": "none"}}, "muon cannot be made"),
        ({"name": "tests.test_optim:optim", "options": {"a": 1}}, "not for a factory"),
    ],
)
def test_settings_are_checked_before_the_model_is_loaded(settings, said):
    config = build({"model": "m", "data": "d", "optim": settings}).optim
    with pytest.raises(ConfigError, match=said):
        check_optimizer(config)


def test_muon_trains_bfloat16_weights_through_their_float32_copies(values, tmp_path):
    whole, again = resumed(values, tmp_path, dtype="bfloat16", **optim("muon"), **deepspeed(0))
    start = weights(Path(values["model"]))
    assert same(whole, again) and not same(whole, start, within=1e-3)


@pytest.mark.parametrize(("name", "stage"), [("muon", 1), ("adafactor", 3)])
def test_matrices_that_deepspeed_flattens_are_refused(values, name, stage):
    config = build(merged(values, optim__name=name, **deepspeed(stage)))
    with pytest.raises(ConfigError, match="needs whole matrices"):
        check_settings(config, RLP, ranks=1)
