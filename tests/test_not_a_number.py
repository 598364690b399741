"""What is not a number sets no best, ends no run, and is null in every file (issue 15.12)."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from rlpretrain.config.io import build
from rlpretrain.evaluation.evaluate import Evaluation
from rlpretrain.files import dumps, finite
from rlpretrain.objectives.base import rewards_differ
from rlpretrain.ranks import Ranks
from rlpretrain.reporting.report import read_run
from rlpretrain.tracking.step_metrics import StepMetrics
from rlpretrain.tracking.trackers import Trackers
from rlpretrain.training.records import write_json
from rlpretrain.training.run import Run
from rlpretrain.training.run_evaluation import evaluate_run
from rlpretrain.types import Document
from rollout.types import FinishReason, Group, Position, Prompt, Thought
from tests.builders.runs import merged


def parsed(text: str):
    """Strict JSON."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_an_evaluation_of_a_broken_model_is_no_best_and_uses_up_no_patience(values, corpus, capsys):
    """NaN > x is False, so a first NaN stayed the best for ever, and every later one brought the end
    nearer.
    """
    run = Run(
        build(
            merged(
                values,
                objective="ntp",
                eval__data=str(corpus / "held_out.jsonl"),
                eval__every=1,
                eval__documents=4,
                stop__patience=1,
                console=True,
            )
        ),
        None,
    )
    try:
        weight = next(p for p in run.policy.model.parameters() if p.dim() == 1)
        fine = weight.detach().clone()
        with torch.no_grad():
            weight.fill_(math.nan)
        run.step = 1
        row = evaluate_run(run)
        assert run.best == {"step": None, "gain": None, "stale": 0} and run.stopped is None
        assert row["eval/not_finite"] == 1.0 and math.isnan(row["eval/no_think_loss"])
        assert "the evaluation decides nothing (100% of the positions" in capsys.readouterr().out
        run.best["gain"] = math.nan  # as an older checkpoint may have it
        with torch.no_grad():
            weight.copy_(fine)
        run.step = 2
        row = evaluate_run(run)
        assert (
            run.best["step"] == 2
            and run.best["gain"] == pytest.approx(-row["eval/no_think_loss"])
            and run.stopped is None
        )
        assert "eval/not_finite" not in row
    finally:
        run.close()


def test_a_position_that_is_not_finite_is_in_no_mean_and_is_counted():
    documents = [Document(str(i), (1, 2, 3)) for i in range(10)]
    gain = np.arange(10.0)
    gain[3], gain[4] = np.nan, -np.inf
    found = Evaluation(
        {"gain": gain, "gain_frozen": gain}, documents, np.ones(10), np.full(10, 2.0), []
    ).summary()
    assert (
        found["gain"] == pytest.approx(38 / 8)
        and np.isfinite(found["gain_ci"]).all()
        and found["no_think_loss"] == 1.0
    )
    assert found["not_finite"] == pytest.approx(0.2)


def test_metrics_hold_no_nan_and_trackers_are_not_given_any(tmp_path):
    given = []
    trackers = Trackers(tmp_path, (), {}, "run")
    trackers.sinks.append(lambda row, step, thoughts: given.append(row))
    trackers.write(1, {"reward": math.nan, "grad_norm": math.inf, "loss": 1.5})
    (row,) = map(parsed, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert (row["reward"], row["grad_norm"], row["loss"]) == (None, None, 1.5) and given == [{"loss": 1.5}]
    (tmp_path / "metrics.jsonl").open("a").write(
        '{"step": 2, "loss": NaN, "reward": 1.0}\n'
    )  # as it was written before
    assert [set(r) for r in read_run(tmp_path).rows] == [{"step", "time", "loss"}, {"step", "reward"}]


def test_means_leave_out_single_values_as_they_do_elements():
    metrics = StepMetrics()
    for value in (1.0, math.nan, 3.0, -math.inf):
        metrics.add("perf/probe_s", value)
    metrics.add("reward", torch.tensor([2.0, math.nan]))
    metrics.add("grad_norm", math.nan)
    assert metrics.means(Ranks()) == {"perf/probe_s": 2.0, "reward": 2.0}


def test_every_record_is_json(tmp_path):
    record = {
        "best": {"gain": math.nan},
        "ci": (1.0, -math.inf),
        "path": Path("a"),
        "n": 3,
        "inner": [[math.inf]],
    }
    write_json(tmp_path / "run.json", record)
    assert parsed((tmp_path / "run.json").read_text()) == {
        "best": {"gain": None},
        "ci": [1.0, None],
        "path": "a",
        "n": 3,
        "inner": [[None]],
    }
    assert parsed(dumps({"a": math.nan})) == {"a": None} and finite({"a": 1.5, "b": [2]}) == {
        "a": 1.5,
        "b": [2],
    }


def test_no_module_writes_json_that_may_hold_nan():
    """Files that people read go through `files.dumps`; what is left is configuration, requests and test
    data.
    """
    root = Path(__file__).parents[1] / "rlpretrain"
    writers = {
        "training/records.py",
        "tracking/trackers.py",
        "training/checkpoint.py",
        "commands/training.py",
    }
    for name in writers:
        assert "json.dumps(" not in (root / name).read_text().replace("json.dumps(config)", "").replace(
            "json.dumps(to_dict(build(", ""
        ), name


@pytest.mark.parametrize(
    ("rewards", "worth"),
    [
        ((1.0, 1.0, math.nan), False),
        ((math.nan, math.nan), False),
        ((0.0, 1.0, math.nan), True),
        ((), False),
        (None, False),
    ],
)
def test_nan_does_not_make_rewards_different(rewards, worth):
    thought = Thought((5,), (0.0,), FinishReason.CLOSE, 0, 0)
    group = Group("g", Position("d", 1, (1,), (2,)), Prompt((1,), ()), (thought,) * 3, 0)
    assert rewards_differ(dataclasses.replace(group, rewards=rewards)) is worth
