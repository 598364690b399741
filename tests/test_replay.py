"""Rollouts that were kept are trained on again: bit-identically where the run was synchronous."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from rlpretrain import cli
from rlpretrain.config import ConfigError
from rlpretrain.config.io import build
from rlpretrain.training.pretrainer import Pretrainer
from tests.builders.runs import merged, same, trained, weights

RUNS = {
    "rlp": {},
    "several micro-batches": {
        "token_budget": 90,
        "objective": {"name": "rlp", "positions": "random", "target_length": 3},
    },
    "ema, two inner epochs": {"baseline__name": "ema", "loss__inner_epochs": 2},
    "ntp": {"objective": "ntp"},
    "deepspeed": {"policy": {"backend": "deepspeed"}},
}


@pytest.mark.parametrize("name", RUNS)
def test_replaying_a_run_gives_the_same_weights(values, tmp_path, name):
    run = merged(values, max_steps=4, **RUNS[name])
    first = trained(run, save_rollouts=True, output_dir=str(tmp_path / "first"))
    again = trained(run, replay=str(tmp_path / "first" / "rollouts"), output_dir=str(tmp_path / "again"))
    assert same(first, again) and not same(first, weights(Path(run["model"])))
    assert json.loads((tmp_path / "again" / "run.json").read_text())["engine"]["kind"] == "recorded"


def test_a_separate_stream_is_kept_too(values, tmp_path, corpus):
    run = merged(values, ntp_data={"path": str(corpus / "base.jsonl"), "max_length": 64})
    first = trained(run, save_rollouts=True, output_dir=str(tmp_path / "first"))
    again = trained(values, replay=str(tmp_path / "first" / "rollouts"), output_dir=str(tmp_path / "again"))
    assert same(first, again)


def test_a_replay_can_stop_and_resume(values, tmp_path):
    run = merged(values, max_steps=4)
    first = trained(run, save_rollouts=True, output_dir=str(tmp_path / "first"))
    again = merged(
        run,
        replay=str(tmp_path / "first" / "rollouts"),
        output_dir=str(tmp_path / "again"),
        checkpoint={"every": 2},
    )
    trained(again, max_steps=2)
    assert same(first, trained(again, resume="auto"))


def test_only_sampling_then_only_training(values, tmp_path, capsys):
    """`rlpretrain rollout` moves no weight; training on what it kept says that thoughts of later steps are
    stale.
    """
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(merged(values, max_steps=3, output_dir=str(tmp_path / "sampled"))))
    assert cli.main(["rollout", str(file)]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    said = json.loads((tmp_path / "sampled" / "result.json").read_text())
    assert last == (
        f"3 steps, 12 groups; train on them: --replay {tmp_path / 'sampled'}; "
        f"numbers: {tmp_path / 'sampled' / 'result.json'}"
    )
    assert said == {"steps": 3, "groups": 12, "rollouts": str(tmp_path / "sampled" / "rollouts")}
    assert not (tmp_path / "sampled" / "model").exists()
    words = ["--output_dir", str(tmp_path / "t"), "--replay", str(tmp_path / "sampled")]
    assert cli.main(["train", str(file), *words]) == 0
    rows = [json.loads(line) for line in (tmp_path / "t" / "metrics.jsonl").read_text().splitlines()]
    assert "sampling/raw_max" not in rows[0] and all(row["sampling/raw_max"] != 1 for row in rows[1:])


def test_a_replay_that_cannot_be_is_refused(values, tmp_path):
    with pytest.raises(ConfigError, match="replay: no rollouts of rank 0 in"):
        Pretrainer(build(merged(values, replay=str(tmp_path / "nowhere")))).train()
    trained(values, save_rollouts=True, output_dir=str(tmp_path / "first"))
    for file in (tmp_path / "first" / "rollouts").glob("step-000002-*"):
        file.unlink()
    with pytest.raises(ConfigError, match="replay: no rollouts of step 2 in .*: it holds 2 steps, 1 to 3"):
        Pretrainer(build(merged(values, replay=str(tmp_path / "first" / "rollouts")))).train()
