"""Torch and DeepSpeed, every ZeRO stage, one rank and two: the same update from the same groups."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rlpretrain.config import ConfigError
from rlpretrain.config.io import build
from rlpretrain.training.backends.deepspeed import ds_settings
from rlpretrain.training.loop import train
from rlpretrain.training.run import Run
from rlpretrain.training.schedules import make_schedule
from tests.builders.policies import SHARDED
from tests.builders.runs import launch, merged, same, trained, weights

STAGES = (0, 1, 2, 3)


def deepspeed(stage: int, **changes) -> dict:
    own = {"deepspeed_config": SHARDED} if stage == 3 else {"zero_stage": stage}
    return {"policy": {"backend": "deepspeed", **own}, **changes}


def norms(folder: Path) -> list[float]:
    return [json.loads(line)["grad_norm"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("stage", STAGES)
def test_deepspeed_trains_like_torch(values, tmp_path, stage):
    torch_weights = trained(values, output_dir=str(tmp_path / "torch"))
    ours = trained(values, output_dir=str(tmp_path / "ds"), **deepspeed(stage))
    for name, tensor in torch_weights.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=2e-5)
    assert norms(tmp_path / "ds") == pytest.approx(norms(tmp_path / "torch"), rel=1e-3)


@pytest.mark.parametrize("stage", (0, 3))
def test_deepspeed_resumes_bit_identically(values, tmp_path, stage):
    run = merged(values, **deepspeed(stage, max_steps=4, checkpoint__every=2, baseline__name="ema"))
    whole = trained(run, output_dir=str(tmp_path / "whole"))
    (tmp_path / "parts").mkdir()
    (tmp_path / "whole" / "checkpoint-2").rename(tmp_path / "parts" / "checkpoint-2")
    resumed = trained(run, resume="auto", output_dir=str(tmp_path / "parts"))
    assert same(whole, resumed)


def test_deepspeed_bf16_trains(values, tmp_path):
    run = merged(values, **deepspeed(2, optim__lr=1e-3))
    run["model"] = {"path": run["model"], "dtype": "bfloat16"}
    moved = trained(run, output_dir=str(tmp_path / "bf16"))
    start = weights(Path(run["model"]["path"]))
    assert any(not torch.equal(moved[n].float(), start[n].bfloat16().float()) for n in start)
    assert all(bool(torch.isfinite(w).all()) for w in moved.values())


def test_torch_bf16_keeps_a_float32_copy(values, tmp_path):
    """Updates far below bf16's resolution add up."""
    run = merged(values, optim__lr=1e-5, max_steps=3)
    run["model"] = {"path": run["model"], "dtype": "bfloat16"}
    held = Run(build(merged(run, output_dir=str(tmp_path / "r"))), None)
    before = [m.detach().clone() for _, m in held.policy.masters]
    train(held)
    assert held.policy.model.dtype == torch.bfloat16 and before[0].dtype == torch.float32
    assert any(not torch.equal(a, m) for a, (_, m) in zip(before, held.policy.masters, strict=True))


@pytest.mark.slow
def test_two_ranks_train_like_one(values, tmp_path):
    """Torch and ZeRO 0 to 3 on two ranks, with uneven micro-batches, against one rank; and an exact resume
    on two.
    """
    base = merged(values, token_budget=150, positions_per_step=6)
    one = trained(base, output_dir=str(tmp_path / "one"))
    kinds = {"torch": {}} | {f"zero{s}": deepspeed(s) for s in STAGES}
    jobs = [
        {"config": merged(base, output_dir=str(tmp_path / name), **changes)}
        for name, changes in kinds.items()
    ]
    halves = merged(
        base, output_dir=str(tmp_path / "zero3"), **deepspeed(3, max_steps=3, checkpoint__every=2)
    )
    jobs.append({"config": merged(halves, output_dir=str(tmp_path / "first"))})
    jobs.append({"config": merged(halves, output_dir=str(tmp_path / "again"))})
    launch(jobs[:-1], tmp_path)
    for name in kinds:
        assert norms(tmp_path / name) == pytest.approx(norms(tmp_path / "one"), rel=1e-2), name
        two = weights(tmp_path / name / "model")
        for parameter, tensor in one.items():
            torch.testing.assert_close(
                two[parameter], tensor, rtol=1e-4, atol=5e-5, msg=lambda m, n=name: f"{n}: {m}"
            )
    (tmp_path / "again").mkdir()
    (tmp_path / "first" / "checkpoint-2").rename(tmp_path / "again" / "checkpoint-2")
    launch([jobs[-1] | {"resume": "auto"}], tmp_path)
    assert same(weights(tmp_path / "first" / "model"), weights(tmp_path / "again" / "model"))


def test_gradient_checkpointing_changes_nothing(values, tmp_path):
    plain = trained(values, output_dir=str(tmp_path / "plain"))
    saved = merged(values, output_dir=str(tmp_path / "saved"))
    saved["model"] = {"path": saved["model"], "gradient_checkpointing": True}
    recomputed = trained(saved)
    for name, tensor in plain.items():
        torch.testing.assert_close(recomputed[name], tensor, rtol=1e-5, atol=1e-6)


def test_autocast_trains_float32_weights_in_bfloat16(values, tmp_path):
    plain = trained(values, output_dir=str(tmp_path / "plain"), max_steps=1)
    cast = trained(values, output_dir=str(tmp_path / "cast"), max_steps=1, policy__autocast="bfloat16")
    start = weights(Path(values["model"]))
    moved = sum(float((plain[n] - start[n]).norm()) for n in plain)
    apart = sum(float((plain[n] - cast[n]).norm()) for n in plain)
    assert 0 < apart < moved and all(w.dtype == torch.float32 for w in cast.values())


def test_deepspeed_json_of_the_user(tmp_path):
    file = tmp_path / "ds.json"
    file.write_text(
        json.dumps(
            {
                "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"},
                "train_batch_size": "auto",
                "gradient_clipping": 0.5,
                "optimizer": {"type": "AdamW"},
                "gradient_accumulation_steps": 8,
            }
        )
    )
    config = build(
        {"model": "m", "data": "d", "policy": {"backend": "deepspeed", "deepspeed_config": str(file)}}
    )
    settings = ds_settings(config.policy, config.optim, torch.float32)
    assert (
        settings["zero_optimization"]["stage"] == 2
        and "reduce_bucket_size" not in settings["zero_optimization"]
    )
    assert settings["gradient_clipping"] == 0.5 and settings["gradient_accumulation_steps"] == 1
    assert "optimizer" not in settings and "train_batch_size" not in settings
    file.write_text("{")
    with pytest.raises(ConfigError, match="deepspeed_config"):
        ds_settings(config.policy, config.optim, torch.float32)
    file.write_text(json.dumps({"fp16": {"enabled": True}}))
    with pytest.raises(ConfigError, match="fp16"):
        ds_settings(config.policy, config.optim, torch.float32)


@pytest.mark.parametrize("stage", (None, 0, 2))
def test_the_optimizer_is_fused(values, stage):
    changes = {} if stage is None else deepspeed(stage)
    run = Run(build(merged(values, **changes)), None)
    optimizer = run.policy.optimizer if stage is None else run.policy.engine.basic_optimizer
    run.close()
    assert all(group["fused"] for group in optimizer.param_groups)


def test_schedules():
    config = build(
        {"model": "m", "data": "d", "optim": {"warmup_steps": 4, "schedule": "cosine", "min_lr_ratio": 0.1}}
    ).optim
    factor = make_schedule(config, 104)
    assert [factor(i) for i in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert factor(4) == 1.0 and factor(54) == pytest.approx(0.55) and factor(104) == pytest.approx(0.1)
    config.schedule.name = "linear"
    assert make_schedule(config, 104)(54) == pytest.approx(0.55)
    config.schedule.name = "constant"
    assert make_schedule(config, 104)(1000) == 1.0
