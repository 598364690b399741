"""The simulation of throughput (`python -m benchmarks.scaling`) against cases worked out by hand."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.scaling import (
    Speeds,
    Work,
    decode_seconds,
    main,
    sampling_seconds,
    simulate,
    sync_seconds,
    table,
    training_seconds,
)
from tests.builders.runs import ROOT

SPEEDS = Speeds(decode_s=1e-3, decode_row_s=1e-5, slots=4)
EQUAL = Work(documents=2, positions=2, thoughts=4, mean_length=1e9, limit=100)
"""16 thoughts, all at the limit."""


def test_rows_that_end_leave_the_batch_and_waiting_ones_enter():
    assert decode_seconds(np.full(4, 100), SPEEDS) == pytest.approx(100 * (1e-3 + 4e-5))
    assert decode_seconds(np.full(8, 100), SPEEDS) == pytest.approx(200 * (1e-3 + 4e-5))
    one_left = 10 * (1e-3 + 4e-5) + 90 * (1e-3 + 1e-5)
    assert decode_seconds(np.array([10, 10, 10, 100]), SPEEDS) == pytest.approx(one_left)
    # a fifth thought takes the first free slot: four rows for 60 steps, then the one of 100
    entered = 10 * (1e-3 + 4e-5) + 50 * (1e-3 + 4e-5) + 40 * (1e-3 + 1e-5)
    assert decode_seconds(np.array([10, 60, 60, 100, 50]), SPEEDS) == pytest.approx(entered)


def test_the_slowest_engine_decides():
    lengths = np.array([10, 100, 10, 10])
    assert sampling_seconds(lengths, 2, SPEEDS) == pytest.approx(decode_seconds(np.array([100, 10]), SPEEDS))
    assert sampling_seconds(lengths, 9, SPEEDS) == pytest.approx(decode_seconds(np.array([100]), SPEEDS))


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_a_step_takes_the_sum_or_the_slower_half(staleness):
    sampling = sampling_seconds(EQUAL.lengths(np.random.default_rng(0)), 2, SPEEDS)
    training, sync = training_seconds(EQUAL, 2, SPEEDS), sync_seconds(2, SPEEDS)
    course = simulate(EQUAL, SPEEDS, samplers=2, trainers=2, staleness=staleness, steps=400)
    wanted = sampling + training + sync if staleness == 0 else max(sampling, training) + sync
    assert course.step_s == pytest.approx(wanted, rel=0.01)
    assert course.sampler_busy == pytest.approx(sampling / wanted, rel=0.02)
    assert course.trainer_busy == pytest.approx(training / wanted, rel=0.02)


def test_training_on_more_cards_receives_the_weights():
    alone, eight = (training_seconds(Work(), gpus, Speeds()) for gpus in (1, 8))
    assert alone == Work().trained_tokens / Speeds().trained_tokens_per_s
    without_links = training_seconds(Work(), 8, replace(Speeds(), node_link=1e30))
    assert without_links == pytest.approx(alone / 8) and eight > without_links


def test_the_measured_run_is_a_little_slower_than_its_simulation():
    """20 steps on one card (docs/gpu.md): 1.33 s of sampling, .40 s of training, 1.85 s a step."""
    work = Work(documents=1, positions=4, thoughts=16, mean_length=1e9, limit=256, target=32)
    sampling = sampling_seconds(work.lengths(np.random.default_rng(0)), 1, Speeds())
    step = sampling + 19_455 / Speeds().trained_tokens_per_s + Speeds().sync_s
    assert sampling == pytest.approx(1.33, rel=0.15) and step == pytest.approx(1.85, rel=0.15)


def test_the_committed_table_is_what_the_command_makes(tmp_path, capsys):
    committed = json.loads((ROOT / "benchmarks" / "results" / "scaling.json").read_text())
    (row,) = table(Work(), Speeds(), [1], 1)
    assert committed["rows"][0] == pytest.approx(row)
    assert main(["--nodes", "1", "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "scaling.json").read_text())["rows"][0] == pytest.approx(row)
    assert "split_step_s" in capsys.readouterr().out


def test_the_documented_table_has_the_committed_numbers():
    text = (ROOT / "docs" / "scale.md").read_text().partition("## What saturates first")[2]
    documented = [
        line.strip("| ").split(" | ") for line in text.splitlines() if line[:3].strip("| ").isdigit()
    ]
    committed = json.loads((ROOT / "benchmarks" / "results" / "scaling.json").read_text())["rows"]
    assert documented == [
        [
            str(row["nodes"]),
            f"{row['shared_step_s']:.1f}",
            f"{row['shared_decoding']:.2f}".lstrip("0"),
            f"{row['split_step_s']:.1f}",
            str(row["samplers"]),
            f"{row['sampler_busy']:.2f}".lstrip("0"),
            f"{row['trainer_busy']:.2f}".lstrip("0"),
        ]
        for row in committed
    ]
