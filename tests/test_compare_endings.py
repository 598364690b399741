"""A comparison whose process is killed leaves no training behind that goes on by itself."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from rlpretrain.training import checkpoint
from tests.builders.configs import tiny_values
from tests.builders.processes import start


def wait_for(is_true: Callable[[], bool], output: Path, seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < until, output.read_text()
        time.sleep(0.2)


@pytest.mark.slow
def test_the_training_of_a_killed_comparison_ends_with_a_checkpoint(corpus, tmp_path):
    values = tiny_values(corpus, tmp_path / "unused") | {"max_steps": 100_000, "threads": 1}
    (tmp_path / "rlp.yaml").write_text(yaml.safe_dump(values))
    experiment = {
        "methods": {"rlp": {"config": "rlp.yaml"}},
        "evaluation": {"data": {"path": str(corpus / "held_out.jsonl")}, "documents": 4},
        "seeds": [0],
        "output_dir": str(tmp_path / "compared"),
    }
    file, output = tmp_path / "experiment.yaml", tmp_path / "output.txt"
    file.write_text(yaml.safe_dump(experiment))
    folder = tmp_path / "compared" / "rlp-0"
    log, record = folder / "metrics.jsonl", folder / "run.json"
    process = start(["-m", "rlpretrain.cli", "compare", str(file)], output)
    wait_for(lambda: log.exists() and log.read_text().count("\n") >= 2, output)
    process.kill()
    wait_for(lambda: json.loads(record.read_text())["status"] == "interrupted", output)
    last = json.loads(log.read_text().splitlines()[-1])["step"]
    assert checkpoint.steps(folder) == [last]
    time.sleep(1)
    assert json.loads(log.read_text().splitlines()[-1])["step"] == last
