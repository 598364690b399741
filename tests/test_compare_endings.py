"""A comparison whose process is killed leaves no training behind that goes on by itself."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.builders.configs import tiny_values

ROOT = Path(__file__).parents[1]


def wait_for(is_true: Callable[[], bool], seconds: float, what: str, output: Path) -> None:
    until = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < until, f"{what} did not happen within {seconds} s: {output.read_text()}"
        time.sleep(0.2)


@pytest.mark.slow
def test_the_trainings_of_a_killed_comparison_end_with_a_checkpoint(corpus, tmp_path):
    values = tiny_values(corpus, tmp_path / "unused") | {"max_steps": 100_000, "threads": 1}
    (tmp_path / "rlp.yaml").write_text(yaml.safe_dump(values))
    experiment = {
        "methods": {"rlp": {"config": "rlp.yaml"}},
        "evaluation": {"data": {"path": str(corpus / "held_out.jsonl")}, "documents": 4},
        "seeds": [0],
        "output_dir": str(tmp_path / "compared"),
    }
    file = tmp_path / "experiment.yaml"
    file.write_text(yaml.safe_dump(experiment))
    folder = tmp_path / "compared" / "rlp-0"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    output = tmp_path / "output.txt"
    with output.open("w") as file_of_output:
        parent = subprocess.Popen(
            [sys.executable, "-m", "rlpretrain.cli", "compare", str(file)],
            env=environment,
            start_new_session=True,
            stdout=file_of_output,
            stderr=subprocess.STDOUT,
        )
    try:
        log = folder / "metrics.jsonl"
        wait_for(lambda: log.exists() and log.read_text().count("\n") >= 2, 120, "the second step", output)
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        record = folder / "run.json"
        wait_for(lambda: json.loads(record.read_text())["status"] == "interrupted", 60, "the end", output)
        steps = json.loads(log.read_text().splitlines()[-1])["step"]
        assert (folder / f"checkpoint-{steps}").is_dir()
        wait_for(lambda: not _has_members(parent.pid), 30, "the end of the training's process", output)
    finally:
        if _has_members(parent.pid):
            os.killpg(parent.pid, signal.SIGKILL)


def _has_members(group: int) -> bool:
    """Whether a process of this group lives."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
