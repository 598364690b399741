"""What the dry run says ranks receive, against the bytes of the collectives of real runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlpretrain.config.io import build
from rlpretrain.tools.communication import communication
from rlpretrain.tools.dry_run import dry_run, make_objective, model_shape
from rlpretrain.tools.sizes import make_sizes, measure_documents
from tests.builders.processes import alone, ranks
from tests.builders.runs import merged

BACKENDS = {
    "torch": {"backend": "torch"},
    "fsdp": {"backend": "fsdp"},
    "kept": {"backend": "fsdp", "fsdp": {"reshard": False}},
}
BASELINES = {"torch": "self", "fsdp": "ema", "kept": "self"}


def estimate(values: dict, size: int, monkeypatch) -> dict[str, float]:
    """The parts that the dry run prints, in bytes."""
    monkeypatch.setenv("WORLD_SIZE", str(size))
    config = build(values)
    objective = make_objective(config, [])
    shape, _ = model_shape(config.model, Path())
    longest = measure_documents(config, objective, [])
    items = communication(config, objective, shape, make_sizes(config, objective, shape, [], longest))
    assert items is not None
    return {item.name: item.bytes for item in items}


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("objective", ["ntp", "rlp"])
def test_the_estimate_is_what_ranks_receive(values, tmp_path, monkeypatch, backend, objective):
    """One micro-batch a step. Under FSDP the small weights of a unit are padded, so it is a little more."""
    run = merged(values, policy=BACKENDS[backend], max_steps=3, baseline__name=BASELINES[backend])
    run["objective"] = "ntp" if objective == "ntp" else run["objective"]
    file = tmp_path / "counts.json"
    arguments = ("-m", "tests.scripts.count_traffic", json.dumps(run), str(file))
    done = ranks(2, *arguments, environment=alone() | {"DS_ACCELERATOR": "cpu"})
    assert done.returncode == 0, done.stderr[-3000:]
    *_, counted = json.loads(file.read_text())  # the first step checks more
    expected = sum(estimate(run, 2, monkeypatch).values())
    assert counted == pytest.approx(expected, rel=0.05)


def test_replicas_gather_less_and_reduce_twice(values, monkeypatch):
    run = merged(values, policy={"backend": "fsdp"})
    together = estimate(run, 4, monkeypatch)
    apart = estimate(merged(run, policy__fsdp={"replicas": 2}), 4, monkeypatch)
    name = "weights for forward and backward"
    assert apart[name] == pytest.approx(together[name] * (1 / 2) / (3 / 4))
    assert "gradients between replicas" in apart and "gradients between replicas" not in together


def test_one_rank_receives_nothing_and_deepspeed_is_not_guessed(values, monkeypatch, capsys):
    assert estimate(values, 1, monkeypatch) == {}
    monkeypatch.setenv("WORLD_SIZE", "2")
    dry_run(build(merged(values, policy={"backend": "deepspeed", "zero_stage": 2})), Path())
    assert "what ranks send each other is not known for policy.backend deepspeed" in capsys.readouterr().out
    dry_run(build(merged(values, policy={"backend": "fsdp"})), Path())
    assert "A rank receives in a step" in capsys.readouterr().out
