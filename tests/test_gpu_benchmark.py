"""`python -m benchmarks.gpu` on a CPU: every part runs, and one that fails does not stop the others."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from benchmarks import gpu
from benchmarks.gpu_needs import needed_wheels
from benchmarks.gpu_shapes import TINY, Needed, Settings, make_model, needed_by, peak_of
from benchmarks.gpu_steps import Steps
from tests.builders.processes import ROOT, alone


def run(folder, *options: str) -> tuple[int, dict, str]:
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--tiny", "--output", str(folder)]
    done = subprocess.run([*command, *options], cwd=ROOT, env=alone(), capture_output=True, text=True)
    assert (folder / "gpu.json").exists(), done.stderr[-3000:]
    return done.returncode, json.loads((folder / "gpu.json").read_text()), (folder / "gpu.md").read_text()


@pytest.mark.slow
def test_every_part_runs_on_a_cpu(tmp_path):
    status, results, table = run(tmp_path, "--peak", "1e12")
    parts = results["parts"]
    assert list(parts) == list(gpu.PARTS)
    assert {name: part.get("error") for name, part in parts.items() if part["status"] != "ok"} == {}
    assert status == 0
    for name, part in parts.items():
        assert part["cells"] and all(cell["status"] == "ok" for cell in part["cells"])
        for cell in part["cells"]:
            assert name == "environment" or f"| {cell['name']} |" in table
    cells = {cell["name"].rpartition(": ")[2]: cell["values"] for cell in parts["steps"]["cells"][:2]}
    assert set(cells) == {"tree", "ntp"} and all(0 < values["mfu"] < 1 for values in cells.values())
    assert parts["compilation"]["cells"][-1]["values"]["compilations"] == 2
    assert not list(tmp_path.glob("gpu-*"))


def test_a_part_that_fails_does_not_stop_the_others(tmp_path):
    status, results, table = run(tmp_path, "--parts", "sampling", "environment", "--minutes", "0.02")
    assert status == 1
    assert "stopped after" in results["parts"]["sampling"]["error"]
    assert "stopped after" in table and "environment" in results["parts"]


def test_operations_are_those_of_the_matrices_of_the_model():
    """6 for each entry of each matrix and token, by the model itself."""
    model = make_model(Settings("cpu", tiny=True))
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2) - model.lm_head.weight.numel()
    assert Needed(10, 0, 0).operations(TINY) == 6 * matrices * 10
    assert Needed(0, 0, 10).operations(TINY) == 6 * model.lm_head.weight.numel() * 10
    assert Needed(0, 10, 0).operations(TINY) == 12 * 10 * 2 * 4 * 16  # layers, heads, width of a head


def test_a_tree_needs_each_shared_token_once_and_each_row_its_own_path():
    settings = Settings("cpu", tiny=True)
    shape = settings.shapes[0]
    steps = Steps(settings, recomputed=False)
    batch = steps.batch(shape, 0, "tree")
    tree, padded = (needed_by(steps.take(batch, tree=kind)) for kind in (True, False))
    branch = 1 + shape.thought + shape.target - 1  # open tag, thought, target but its last token
    thoughts = shape.positions * shape.thoughts
    assert tree.tokens == shape.document - 1 + thoughts * branch
    assert tree.rows == padded.rows == thoughts * (shape.thought + shape.target) + shape.document - 1
    assert padded.tokens > tree.tokens and padded.pairs > tree.pairs


def test_peaks_and_wheels():
    assert peak_of("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_of("NVIDIA H100 PCIe") == 756e12
    assert peak_of("NVIDIA H100 NVL") is None and peak_of("NVIDIA GeForce RTX 4090") is None
    wheels = dict(line.split("==") for line in needed_wheels())
    assert {"transformers", "datasets", "pydantic", "numpy", "tokenizers", "jaxtyping"} <= wheels.keys()
    assert not {"torch", "sympy", "vllm", "deepspeed", "matplotlib", "tensorboard"} & wheels.keys()
