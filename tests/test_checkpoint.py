"""Checkpoints: rotation, bit-identical resume from each of them, what is in them, and what a collapse
gives back.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from rewards.controls import CollapseMonitor
from rlpretrain import Pretrainer
from rlpretrain.config import ConfigError
from rlpretrain.config.io import build
from rlpretrain.ranks import Ranks
from rlpretrain.tracking.metrics import METRICS
from rlpretrain.training import checkpoint
from rlpretrain.training.loop import train
from rlpretrain.training.run import Run
from rollout.store import Store
from tests.builders.runs import merged, same, trained, weights

STEPS = 6
LONG = {"max_steps": STEPS, "checkpoint__every": 2, "checkpoint__keep": 9}


def result(values, resume=None, **changes) -> dict:
    return Pretrainer(build(merged(values, **changes))).train(resume=resume)


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


class Part:
    """Something with a file."""

    def save(self, path: Path) -> None:
        (path / "part.bin").write_bytes(b"1234")


# the files


def test_latest_is_the_newest_usable_one_by_number(tmp_path):
    assert checkpoint.latest(tmp_path) == (None, []) and checkpoint.latest(tmp_path / "gone") == (None, [])
    for step in (9, 10, 100):
        checkpoint.save(tmp_path, step, Ranks(), {"part": Part()}, {"config": {}}, {"x": step})
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / ".checkpoint-200.tmp").mkdir()  # a run was killed while it wrote this
    assert checkpoint.steps(tmp_path) == [9, 10, 100] and checkpoint.latest(tmp_path) == (
        tmp_path / "checkpoint-100",
        [],
    )
    (tmp_path / "checkpoint-100" / "part.bin").write_bytes(b"123")
    found, problems = checkpoint.latest(tmp_path)
    assert found == tmp_path / "checkpoint-10"
    assert problems == [f"{tmp_path / 'checkpoint-100'}: part.bin has 3 bytes, 4 were written"]


def test_a_checkpoint_is_written_over_and_leaves_nothing_beside_it(tmp_path):
    for value in (1, 2):
        checkpoint.save(
            tmp_path, 5, Ranks(), {"part": Part()}, {"config": {}, "backend": "x"}, {"value": value}
        )
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-5"]
    state, (mine,) = checkpoint.read(tmp_path / "checkpoint-5", Ranks(), "x", {})
    assert state["step"] == 5 and mine == {"value": 2}


def test_rotation_keeps_the_newest_and_the_best(tmp_path):
    for step in (2, 4, 6, 8, 10):
        checkpoint.save(tmp_path, step, Ranks(), {"part": Part()}, {"config": {}}, {})
    checkpoint.rotate(tmp_path, keep=2, best=4)
    assert checkpoint.steps(tmp_path) == [4, 8, 10]
    checkpoint.rotate(tmp_path, keep=1, best=None)
    assert checkpoint.steps(tmp_path) == [10]


def test_settings_compare_field_by_field(tmp_path):
    old = {"optim": {"lr": 1e-3, "betas": (0.9, 0.95)}, "seed": 0, "max_steps": 3, "output_dir": "a"}
    checkpoint.save(tmp_path, 1, Ranks(), {}, {"config": old, "backend": "x"}, {})
    new = old | {
        "max_steps": 9,
        "output_dir": "b",
        "later": {"field": None},
    }  # free to change, and a field of a newer version
    assert checkpoint.read(tmp_path / "checkpoint-1", Ranks(), "x", new)[0]["config"]["seed"] == 0
    with pytest.raises(
        ValueError, match=r"optim\.lr was 0\.001, is 1\. Use|optim\.lr was 0\.001, is 1\.0\. Use"
    ):
        checkpoint.read(tmp_path / "checkpoint-1", Ranks(), "x", old | {"optim": old["optim"] | {"lr": 1.0}})


# whole runs


def test_a_run_keeps_the_newest_checkpoints_and_the_best(values, corpus, monkeypatch):
    gains = iter([0.1, 0.9, 0.3, 0.2, 0.5, 0.4])
    summary = "rlpretrain.evaluation.evaluate.Evaluation.summary"
    monkeypatch.setattr(summary, lambda self, seed=0: {"gain_frozen": next(gains), "no_think_loss": 1.0})
    out = result(
        values,
        max_steps=6,
        checkpoint__every=2,
        checkpoint__keep=2,
        eval__every=1,
        eval__documents=4,
        eval__data=str(corpus / "held_out.jsonl"),
    )
    folder = Path(values["output_dir"])
    record = json.loads((folder / "run.json").read_text())
    assert record["best"] == {"step": 2, "gain": 0.9, "stale": 4} and out["stopped"] is None
    assert checkpoint.steps(folder) == [2, 4, 6]


KINDS = {
    "ema": {"baseline__name": "ema", "baseline__decay": 0.5, "objective__clip": 0.05},
    "inner epochs": {"loss__inner_epochs": 2},
    "stream": {"data__streaming": True},
    "spare positions": {"objective": {"name": "rlp", "positions_per_document": 3}},
    "entropy": {"objective": {"name": "rlp", "positions": "entropy"}},
    "cosine": {"optim__schedule": "cosine", "optim__weight_decay": 0.1},
    "bfloat16": {"dtype": "bfloat16"},
    "masked": {"sampling__cut": "mask", "loss__reduction": "token_mean", "stop__collapse": True},
    "ntp": {"objective": "ntp", "optim__schedule": "linear"},
}


@pytest.mark.parametrize("kind", [*KINDS, "ntp data"])
def test_resume_after_each_checkpoint_is_bit_identical(values, corpus, tmp_path, kind):
    changes = LONG | KINDS.get(kind, {})
    if kind == "ntp data":
        changes["ntp_data"] = {"path": str(corpus / "base.jsonl"), "max_length": 64}
    whole = trained(values, **changes)
    folder = Path(values["output_dir"])
    for step in (2, 4):
        part = Path(shutil.copytree(folder, tmp_path / f"from {step}"))
        for later in range(step + 2, STEPS + 1, 2):
            shutil.rmtree(part / f"checkpoint-{later}")
        assert same(whole, trained(values, resume="auto", **changes | {"output_dir": str(part)}))
        assert [row["step"] for row in rows(part)] == list(range(1, STEPS + 1))
        clock = {"time", "step_time", *(name for name in METRICS if name.startswith("perf/"))}
        for before, after in zip(rows(folder), rows(part), strict=True):
            assert {k: v for k, v in before.items() if k not in clock} == {
                k: v for k, v in after.items() if k not in clock
            }


def test_spare_positions_really_cross_a_step(values):
    run = Run(build(merged(values, **KINDS["spare positions"])), None)
    run.next_batch()
    run.close()
    assert (
        len(run.source.state_dict()["spare"]) == 8
    )  # four documents with three positions each, for a step of four


def test_resume_by_name_from_an_older_checkpoint_rewrites_what_came_after(values, finished, tmp_path):
    folder = Path(shutil.copytree(finished, tmp_path / "copy"))
    config = build(
        merged(values, output_dir=str(folder), max_steps=6, checkpoint__every=2, checkpoint__keep=3)
    )
    Pretrainer(config).train(resume=str(folder / "checkpoint-2"))
    assert same(weights(folder / "model"), weights(finished / "model"))
    assert [row["step"] for row in rows(folder)] == [1, 2, 3, 4, 5, 6]


def test_a_resumed_run_forgets_the_rollouts_that_came_after(values, tmp_path):
    run = merged(values, output_dir=str(tmp_path / "run"), save_rollouts=True, **LONG)
    Pretrainer(build(run)).train()
    shorter = build(merged(run, max_steps=4))
    Pretrainer(shorter).train(resume=str(tmp_path / "run" / "checkpoint-2"))
    assert Store(tmp_path / "run" / "rollouts").steps() == [1, 2, 3, 4]


def test_half_a_line_of_metrics_is_dropped(values, finished, tmp_path):
    folder = Path(shutil.copytree(finished, tmp_path / "copy"))
    with (folder / "metrics.jsonl").open("a") as f:
        f.write('{"step": 7, "lo')
    result(values, "auto", output_dir=str(folder), max_steps=8, checkpoint__every=2)
    assert [row["step"] for row in rows(folder)] == list(range(1, 9))


def test_a_finished_run_resumes_to_nothing(values, finished, tmp_path):
    folder = Path(shutil.copytree(finished, tmp_path / "copy"))
    out = result(values, "auto", output_dir=str(folder), max_steps=6, checkpoint__every=2)
    assert out["steps"] == 6 and same(weights(folder / "model"), weights(finished / "model"))


def test_a_longer_run_goes_on_where_a_shorter_one_ended(values, finished, tmp_path):
    folder = Path(shutil.copytree(finished, tmp_path / "copy"))
    longer = trained(
        values, resume="auto", output_dir=str(folder), max_steps=9
    )  # a constant schedule does not know the end
    assert same(longer, trained(values, output_dir=str(tmp_path / "whole"), max_steps=9))


# the end of a run


class Collapsing(CollapseMonitor):
    """Fires at the fifth observation."""

    seen = 0

    def observe(self, **numbers):
        self.seen += 1
        return "it fell" if self.seen == 5 else None


def test_a_collapse_gives_back_the_best_checkpoint(values, corpus, monkeypatch):
    monkeypatch.setattr("rlpretrain.training.run_stop.CollapseMonitor", Collapsing)
    run = Run(
        build(
            merged(
                values,
                max_steps=9,
                checkpoint__every=4,
                checkpoint__keep=1,
                eval__every=3,
                eval__documents=4,
                eval__data=str(corpus / "held_out.jsonl"),
                stop__collapse=True,
            )
        ),
        None,
    )
    at_best, finish = {}, run.finish

    def spy(step, batch):
        if step == 3:
            at_best.update({n: p.detach().clone() for n, p in run.policy.model.named_parameters()})
        finish(step, batch)

    run.finish = spy
    train(run)
    last = {n: p.detach().clone() for n, p in run.policy.model.named_parameters()}
    out = run.end()
    run.close()
    folder = Path(values["output_dir"])
    assert out["stopped"] == "collapse: it fell" and out["steps"] == 5 and run.best["step"] == 3
    assert same(weights(folder / "model"), at_best) and not same(last, at_best)
    assert checkpoint.steps(folder) == [3, 5]
    record = json.loads((folder / "run.json").read_text())
    assert record["best_checkpoint_restored"] == str(folder / "checkpoint-3") and record["status"] == "done"


@pytest.mark.parametrize("evaluated", [False, True])
def test_a_collapse_without_a_checkpoint_keeps_the_last_weights(values, corpus, monkeypatch, evaluated):
    monkeypatch.setattr("rlpretrain.training.run_stop.CollapseMonitor", Collapsing)
    held_out = (
        {"eval__every": 2, "eval__documents": 4, "eval__data": str(corpus / "held_out.jsonl")}
        if evaluated
        else {}
    )
    out = result(values, max_steps=9, stop__collapse=True, **held_out)
    assert out["stopped"] == "collapse: it fell" and out["steps"] == 5
    assert weights(Path(values["output_dir"]) / "model")


def test_patience_stops_a_run_that_gets_no_better(values, corpus):
    out = result(
        values,
        max_steps=9,
        optim__lr=0.0,
        stop__patience=2,
        eval__every=1,
        eval__documents=4,
        eval__data=str(corpus / "held_out.jsonl"),
    )
    assert out["stopped"] == "patience: no better gain in 2 evaluations" and out["steps"] == 3


def test_the_monitor_sees_the_same_after_a_resume(values, tmp_path):
    changes = {"max_steps": 4, "checkpoint__every": 2, "stop__collapse": True, "stop__collapse_window": 3}
    trained(values, **changes)
    folder = Path(values["output_dir"])
    shutil.rmtree(folder / "checkpoint-4")
    run = Run(build(merged(values, **changes)), "auto")
    assert len(run.monitor.state_dict()["gains"]) == 2
    train(run)
    run.close()
    assert len(run.monitor.state_dict()["gains"]) == 3


def test_run_json_says_what_ran(values, finished, tmp_path):
    text = (finished / "run.json").read_text()
    record = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert (
        record["status"] == "done"
        and record["stopped"] is None
        and record["step"] == record["total_steps"] == 6
    )
    config = record["config"]
    assert (
        config["objective"]["marker"] == "shows" and config["objective"]["reduction"] == "sum"
    )  # given, and a default
    assert config["optim"]["betas"] == [0.9, 0.95] and config["policy"]["backend"] == "torch"
    assert record["backend"] == "TorchPolicy" and record["ranks"] == 1 and record["device"] == "cpu"
    assert (
        record["versions"]["torch"] == torch.__version__.split("+")[0]
        or record["versions"]["torch"] == torch.__version__
    )
    assert {"python", "transformers", "datasets", "numpy"} <= record["versions"].keys()
    assert record["engine"]["kind"] == "hf" and record["parameters"] > 20_000
    again = {
        k: v for k, v in config.items() if k != "output_dir"
    }  # and it is a configuration that can be run again
    assert build(again | {"output_dir": str(tmp_path / "run")}).optim.lr == 1e-2


def test_state_json_is_json(values):
    trained(values, max_steps=1, checkpoint__every=1)
    text = (Path(values["output_dir"]) / "checkpoint-1" / "state.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_a_checkpoint_of_a_version_with_fewer_settings(values, tmp_path):
    """What it did not know counts as its default; a default that changes what is trained is still refused."""
    from rlpretrain.config.io import to_dict
    from rlpretrain.training.same_settings import filled

    run = merged(values, checkpoint={"every": 2}, max_steps=2)
    trained(run)
    file = tmp_path / "run" / "checkpoint-2" / "state.json"
    state = json.loads(file.read_text())
    del (
        state["config"]["baseline"]["cache_tokens"],
        state["config"]["model"]["quantization"],
        state["config"]["packing"],
    )
    file.write_text(json.dumps(state))
    trained(run, resume="auto", max_steps=3)
    state["config"]["packing"] = "padded"
    file.write_text(json.dumps(state))
    with pytest.raises(ConfigError, match="packing was 'padded', is 'tree'"):
        trained(run, resume=str(file.parent), max_steps=3)
    now = json.loads(json.dumps(to_dict(build(merged(run, policy={"lora": {"r": 4}})))))
    assert filled({"policy": {"lora": {"r": 4}}}, now)["policy"]["lora"] == {
        "r": 4,
        "use_dora": False,
        "new_tokens": False,
    }
    assert filled(now, now) == now
