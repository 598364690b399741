"""Half-precision weights are trained through float32 copies, and gradients add up in float32."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlpretrain.config import LoraConfig
from rlpretrain.config.io import build
from rlpretrain.models.adapters import add_lora
from rlpretrain.ranks import Ranks
from rlpretrain.scoring.layout import Layout
from rlpretrain.scoring.packing import count, pack
from rlpretrain.tools.memory import Sizes, memory
from rlpretrain.training.backends import Policy, make_policy
from rlpretrain.training.optim import make_optimizer, parameter_groups
from tests.builders.batches import VOCABULARY, random_batch
from tests.builders.runs import launch, merged, trained
from tests.builders.tiny import tiny_model

FEW, STEPS = 30, 200
TINY = 1e-6
"""Learning rate: AdamW moves a weight by about this in each step, 1e-5 or less of most weights below."""


def micro_batch() -> Any:
    batch = random_batch(random.Random(1), documents=1, positions=1)
    (micro,) = pack(batch, Layout(10_000, cut="force_close"), count(batch, "force_close"))
    return micro


def small_model(dtype: torch.dtype) -> nn.Module:
    """A model whose weights are numbers of bfloat16, in `dtype`."""
    model = tiny_model("llama", VOCABULARY, num_hidden_layers=1, initializer_range=0.2)
    return model.bfloat16().to(dtype)


def policy_of(model: nn.Module, lr: float = TINY, **policy: Any) -> Policy:
    optim = {"lr": lr, "warmup_steps": 0, "clip_grad_norm": 0}
    config = build({"model": "m", "data": "d", "policy": {"backend": "torch"} | policy, "optim": optim})
    return make_policy(model, config.policy, config.optim, STEPS, Ranks())


def train(policy: Policy, steps: int) -> None:
    micro = micro_batch()
    for _ in range(steps):
        policy.backward(-policy.score(micro).trunk_logps.mean())
        assert policy.step().applied


def float32_weights(policy: Any) -> dict[str, Tensor]:
    """The weights that the optimizer steps on."""
    if hasattr(policy, "engine"):
        from deepspeed.utils import safe_get_full_fp32_param as full

        return {n: full(p) for n, p in policy.model.named_parameters()}
    copies = {id(p): m for p, m in policy.masters}
    return {n: copies.get(id(p), p).detach() for n, p in policy.model.named_parameters()}


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensor.detach().float().flatten() for tensor in tensors.values()])


@pytest.fixture(scope="module")
def exact() -> dict[int, Tensor]:
    """How far a float32 model moves in so many steps, which starts at the same weights."""
    policy = policy_of(small_model(torch.float32))
    start, moved = flat(float32_weights(policy)).clone(), {}
    for before, steps in ((0, FEW), (FEW, STEPS)):
        train(policy, steps - before)
        moved[steps] = flat(float32_weights(policy)) - start
    return moved


@pytest.mark.parametrize(("backend", "stage", "steps"), [("torch", 0, STEPS), ("deepspeed", 2, FEW)])
def test_tiny_updates_add_up_as_in_float32(backend, stage, steps, exact):
    model = small_model(torch.bfloat16)
    start = flat(dict(model.named_parameters()))
    policy = policy_of(model, backend=backend, zero_stage=stage)
    train(policy, steps)
    after = float32_weights(policy)
    moved, expected = flat(after) - start, exact[steps]
    assert nn.functional.cosine_similarity(moved, expected, dim=0) > 0.99
    assert float(moved.norm() / expected.norm()) == pytest.approx(1, abs=0.01)
    for name, weight in policy.model.named_parameters():  # the model has the rounded copies
        assert weight.dtype == torch.bfloat16 and torch.equal(weight, after[name].bfloat16())


def test_an_optimizer_on_bfloat16_weights_loses_tiny_updates(exact):
    """What the copies are for: the same updates, each rounded away."""
    model = small_model(torch.bfloat16)
    start = flat(dict(model.named_parameters()))
    config = policy_of(small_model(torch.float32)).optim
    policy = policy_of(model)
    policy.masters = []
    policy.optimizer = make_optimizer(parameter_groups(model, 0.0), config)
    policy.updated = list(model.parameters())
    for p in policy.updated:
        p._post_accumulate_grad_hooks.clear()
    train(policy, STEPS)
    large = start.abs() > 1e-3
    lost = (flat(dict(model.named_parameters())) == start)[large]
    assert float(lost.float().mean()) > 0.999 and float((exact[STEPS] != 0)[large].float().mean()) > 0.8


SETTINGS = {
    "torch": {},
    "zero0": {"backend": "deepspeed", "zero_stage": 0},
    "zero1": {"backend": "deepspeed", "zero_stage": 1},
    "zero2": {"backend": "deepspeed", "zero_stage": 2},
    "zero3": {"backend": "deepspeed", "zero_stage": 3},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_gradients_of_micro_batches_add_up_in_float32(settings):
    """Fifteen further micro-batches of .001 of the first add 1.5% to its gradient; bfloat16 loses each."""
    micro, norms = micro_batch(), []
    for further in (0, 15):
        policy = policy_of(small_model(torch.bfloat16), **settings)
        for weight in (1.0, *[0.001] * further):
            policy.backward(weight * policy.score(micro).trunk_logps.mean())
        norms.append(policy.step().grad_norm)
    assert norms[1] / norms[0] == pytest.approx(1.015, abs=1e-3)


@pytest.mark.parametrize("settings", [SETTINGS["torch"], SETTINGS["zero0"]], ids=["torch", "zero0"])
def test_a_discarded_gradient_is_gone(settings):
    policy, micro = policy_of(small_model(torch.bfloat16), **settings), micro_batch()
    norms = []
    for discarded in (False, True):
        if discarded:
            policy.backward(policy.score(micro).trunk_logps.mean())
            policy.discard()
        policy.backward(1e-3 * policy.score(micro).trunk_logps.mean())
        norms.append(policy.step().grad_norm)
    assert norms[1] == pytest.approx(norms[0], rel=1e-2)


@pytest.mark.slow
def test_two_ranks_in_bfloat16_have_the_gradients_of_one_in_float32(values, tmp_path: Path):
    """Many micro-batches, unevenly spread."""
    base = merged(values, token_budget=150, positions_per_step=8, max_steps=1)
    half = base | {"model": {"path": base["model"], "dtype": "bfloat16"}}
    kinds = {name: s for name, s in SETTINGS.items() if name != "zero3"}
    jobs = [merged(half, output_dir=str(tmp_path / n), policy={"backend": "torch"} | kinds[n]) for n in kinds]
    launch([{"config": job} for job in jobs], tmp_path)
    norms = {}
    trained(base, output_dir=str(tmp_path / "one"))
    for name in ("one", *kinds):
        norms[name] = json.loads((tmp_path / name / "metrics.jsonl").read_text())["grad_norm"]
    assert list(norms.values()) == pytest.approx([norms["one"]] * len(norms), rel=0.02), norms


def state_of(policy: Any) -> dict[str, Tensor]:
    """What the optimizer has, beside what ZeRO keeps in flat parts."""
    optimizer = policy.engine.optimizer.optimizer if hasattr(policy, "engine") else policy.optimizer
    moments = optimizer.state_dict()["state"]
    return float32_weights(policy) | {
        f"{i} {name}": value for i, state in moments.items() for name, value in state.items()
    }


@pytest.mark.parametrize("settings", [SETTINGS["torch"], SETTINGS["zero2"]], ids=["torch", "zero2"])
def test_a_policy_resumes_bit_identically(settings, tmp_path: Path):
    """The copies are in the checkpoint: the rounded weights would not do."""
    first = policy_of(small_model(torch.bfloat16), **settings)
    train(first, 3)
    first.save(tmp_path)
    second = policy_of(small_model(torch.bfloat16), **settings)
    second.load(tmp_path)
    copies = float32_weights(second)
    assert any(not torch.equal(copies[n], p.float()) for n, p in second.model.named_parameters())
    for policy in (first, second):
        train(policy, 3)
    mine, theirs = state_of(first), state_of(second)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[n], theirs[n]) for n in mine)
    assert {value.dtype for value in mine.values()} == {torch.float32}


def test_only_half_precision_weights_have_copies():
    """A router that is kept in float32 trains itself, also where the first weight is in bfloat16."""
    model = small_model(torch.bfloat16)
    norm: Any = model.get_submodule("model.norm")
    norm.float()
    policy = policy_of(model, lr=1e-3)
    halves = [p for p in model.parameters() if p.dtype == torch.bfloat16]
    assert [id(p) for p, _ in policy.masters] == [id(p) for p in halves] and len(halves) > 5
    before = norm.weight.detach().clone()
    policy.backward(policy.score(micro_batch()).trunk_logps.float().mean())
    policy.step()
    assert not torch.equal(norm.weight, before)


def test_adapters_on_a_bfloat16_model_have_float32_copies():
    """PEFT makes adapters in the dtype of the layer; the optimizer steps on float32."""
    model = add_lora(small_model(torch.bfloat16), LoraConfig(r=2))
    policy: Any = policy_of(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.bfloat16}
    assert [id(p) for p, _ in policy.masters] == [id(p) for p in trained]
    assert {m.dtype for _, m in policy.masters} == {torch.float32}


@pytest.mark.parametrize(
    ("backend", "stage", "bytes_per_parameter"),
    [("torch", 0, 18), ("deepspeed", 0, 18), ("deepspeed", 2, 2 + (4 + 8 + 4) / 4)],
)
def test_the_memory_estimate_has_the_copies(backend, stage, bytes_per_parameter):
    """2 bytes for a weight, 4 for the sum of its gradients, 8 for the moments, 4 for the copy.

    ZeRO shards over 4 ranks.
    """
    model = small_model(torch.bfloat16)
    n = sum(p.numel() for p in model.parameters())
    path = {"path": "m", "dtype": "bfloat16"}
    config = build({"model": path, "data": "d", "objective": "ntp"})
    sizes = Sizes(
        parameters=n,
        trained=n,
        linear=0,
        ranks=4,
        backend=backend,
        stage=stage,
        device="cuda",
        prompt=64,
        row=64,
        micro=256,
    )
    items = memory(config, model.config, sizes)
    always = sum(item.bytes for item in items if item.when == "always" and "initial" not in item.name)
    assert always / n == pytest.approx(bytes_per_parameter)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_deepspeed_file_may_offload_the_optimizer(stage, tmp_path: Path):
    """The same updates; only the norm is summed in another order."""
    norms, after = [], []
    for offload in ({}, {"offload_optimizer": {"device": "cpu"}}):
        file = tmp_path / "deepspeed.json"
        file.write_text(json.dumps({"zero_optimization": {"stage": stage, **offload}}))
        settings = {"backend": "deepspeed", "deepspeed_config": str(file)}
        policy = policy_of(small_model(torch.bfloat16), lr=1e-3, **settings)
        for _ in range(2):
            policy.backward(-policy.score(micro_batch()).trunk_logps.mean())
            norms.append(policy.step().grad_norm)
        after.append(flat(float32_weights(policy)))
    assert norms[:2] == pytest.approx(norms[2:], rel=1e-6)
    torch.testing.assert_close(*after, rtol=1e-5, atol=1e-7)
