"""The average of the weights, against the checkpoints that it averages; under ZeRO, on two ranks, with LoRA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlpretrain import Pretrainer
from rlpretrain.config import ConfigError
from rlpretrain.config.io import build
from rlpretrain.training.averaging import WeightAverage, check_average
from rlpretrain.training.builder import build_parts
from rlpretrain.training.loop import train
from rlpretrain.training.run import Run
from tests.builders.policies import SHARDED
from tests.builders.runs import launch, merged, same, trained, weights

KINDS: dict[str, dict[str, Any]] = {
    "sma": {"kind": "sma", "every": 2, "start": 3},
    "ema": {"kind": "ema", "decay": 0.6},
    "last_k": {"kind": "last_k", "every": 2, "last": 2},
}
STEPS = 6
LONG: dict[str, Any] = {"max_steps": STEPS, "checkpoint__every": 1, "checkpoint__keep": 9, "objective": "ntp"}
WHOLE = {"policy": {"backend": "deepspeed", "zero_stage": 3}}  # so small that DeepSpeed gathers all for good
SHARDS = {"policy": {"backend": "deepspeed", "deepspeed_config": SHARDED}}


def after(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """The weights in a checkpoint of the torch backend."""
    state = torch.load(folder / f"checkpoint-{step}" / "policy.pt", weights_only=True)["model"]
    return {name: values.double() for name, values in state.items() if name != "lm_head.weight"}


def expected(kind: str, folder: Path) -> dict[str, torch.Tensor]:
    """The average from the checkpoints, in float64."""
    at = {step: after(folder, step) for step in range(1, STEPS + 1)}
    if kind == "ema":  # .6^5 of the first, .4 · .6^(6 - s) of each other
        share = {step: 0.4 * 0.6 ** (STEPS - step) for step in at} | {1: 0.6 ** (STEPS - 1)}
    else:
        share = {4: 0.5, 6: 0.5}
    return {name: sum(part * at[step][name] for step, part in share.items()) for name in at[1]}


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_average_of_the_saved_checkpoints(values, kind):
    run = trained(values, average=KINDS[kind], **LONG)
    folder = Path(values["output_dir"])
    found = weights(folder / "averaged")
    for name, mean in expected(kind, folder).items():
        assert float((found[name] - mean).abs().max()) <= 1e-6, name
    assert not same(run, found, within=1e-5)


@pytest.mark.parametrize("kind", ["sma", "last_k"])
def test_equal_weights_have_themselves_as_their_average(values, kind):
    settings = {"kind": kind, "last": 5} if kind == "last_k" else kind
    found = trained(values, average=settings, **LONG | {"optim__lr": 0.0})
    assert same(found, weights(Path(values["output_dir"]) / "averaged"))


def resumed(values: dict[str, Any], tmp_path: Path, **changes: Any) -> tuple[dict, dict]:
    """The averages of a run and of the same run resumed from its checkpoint 3."""
    run = merged(values, **LONG | {"checkpoint__every": 3} | changes)
    trained(run, output_dir=str(tmp_path / "whole"))
    (tmp_path / "parts").mkdir()
    (tmp_path / "whole" / "checkpoint-3").rename(tmp_path / "parts" / "checkpoint-3")
    trained(run, resume="auto", output_dir=str(tmp_path / "parts"))
    assert same(weights(tmp_path / "whole" / "model"), weights(tmp_path / "parts" / "model"))
    return weights(tmp_path / "whole" / "averaged"), weights(tmp_path / "parts" / "averaged")


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("sma", {}),
        ("ema", {}),
        ("last_k", {}),
        ("ema", {"dtype": "bfloat16"}),
        ("last_k", {"dtype": "bfloat16"}),
        ("ema", SHARDS),
        ("last_k", SHARDS),
        ("ema", WHOLE),
        ("ema", {"policy": {"backend": "deepspeed", "zero_stage": 2}}),
        ("sma", {"policy": {"backend": "torch", "lora": {"r": 2}}}),
    ],
)
def test_a_resumed_run_has_the_same_average(values, tmp_path, kind, more):
    whole, again = resumed(values, tmp_path, average=KINDS[kind] | {"start": 0}, **more)
    assert same(whole, again) and not same(whole, weights(tmp_path / "whole" / "model"), within=1e-6)


@pytest.mark.parametrize("settings", [SHARDS, WHOLE])
def test_under_zero_3_it_is_that_of_one_process(values, tmp_path, settings):
    run = merged(values, **LONG, average=KINDS["ema"])
    trained(run, output_dir=str(tmp_path / "one"))
    trained(run, output_dir=str(tmp_path / "zero"), **settings)
    assert same(weights(tmp_path / "zero" / "averaged"), weights(tmp_path / "one" / "averaged"), within=2e-5)
