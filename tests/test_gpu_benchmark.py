"""`python -m benchmarks.gpu` on a CPU: every part runs, and one that fails does not stop the others."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from benchmarks import gpu
from benchmarks.gpu_needs import needed_wheels
from benchmarks.gpu_shapes import TINY, Needed, Settings, make_model, needed_by, peak_of
from benchmarks.gpu_steps import Steps
from benchmarks.gpu_table import table
from tests.builders.processes import ROOT, alone, python


def run(folder, *options: str) -> tuple[int, dict, str]:
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--tiny", "--output", str(folder)]
    done = subprocess.run([*command, *options], cwd=ROOT, env=alone(), capture_output=True, text=True)
    assert (folder / "gpu.json").exists(), done.stderr[-3000:]
    return done.returncode, json.loads((folder / "gpu.json").read_text()), (folder / "gpu.md").read_text()


@pytest.fixture(scope="module")
def all_parts(tmp_path_factory) -> tuple[dict, str]:
    """What every part gave, and the table of it. In forked processes, which have imported the libraries."""
    folder = tmp_path_factory.mktemp("gpu")
    parts = {}
    for name in gpu.PARTS:
        file = folder / f"{name}.json"
        options = ["--device", "cpu", "--tiny", "--peak", "1e12", "--part", name]
        limits = ["--part-file", str(file), "--part-seconds", "280"]
        done = python("-m", "benchmarks.gpu", *options, *limits)
        assert done.returncode == 0, done.stderr[-3000:]
        parts[name] = {"status": "ok", "seconds": 1.0, "cells": json.loads(file.read_text())}
    return parts, table({"benchmark": "gpu", "device": "cpu", "tiny": True, "seconds": 1.0, "parts": parts})


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", gpu.PARTS)
def test_every_part_runs_on_a_cpu(name, all_parts):
    parts, text = all_parts
    cells = {cell["name"]: cell["values"] for cell in parts[name]["cells"]}
    assert cells and all(cell["status"] == "ok" for cell in parts[name]["cells"])
    for cell in cells:
        assert name == "environment" or f"| {cell} |" in text
    if name == "steps":
        kinds = {"tree", "ntp", "padded", "tree, compiled", "ntp, compiled"}
        assert {cell.rpartition(": ")[2] for cell in cells} == kinds
        assert all(0 < values["mfu"] < 1 for values in cells.values())
    if name == "compilation":
        assert {values["compilations"] for values in cells.values()} == {2}


def test_a_part_that_fails_does_not_stop_the_others(tmp_path):
    status, results, text = run(tmp_path, "--parts", "sampling", "environment", "--minutes", "0.02")
    assert status == 1
    assert "stopped after" in results["parts"]["sampling"]["error"]
    assert "stopped after" in text and "environment" in results["parts"]


def test_a_run_whose_parts_all_end_well_has_status_0(tmp_path):
    status, results, text = run(tmp_path, "--parts", "environment")
    assert (status, results["parts"]["environment"]["status"]) == (0, "ok") and "stopped after" not in text


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
    steps = Steps(settings, recomputed=False, compiled=False)
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


def test_the_status_page_has_every_file_that_assumes_cuda():
    """Each such file stands on the page; and each says in its own text where, or only names the device."""
    page = (ROOT / "docs" / "gpu.md").read_text()
    uses = re.compile(r"torch\.cuda\.(?!is_available)|is_cuda|\.to\(\"cuda")
    for package in ("rewards", "rollout", "rlpretrain"):
        for path in sorted((ROOT / package).rglob("*.py")):
            text = path.read_text()
            if "torch.cuda" in text or uses.search(text):
                assert f"`{path.relative_to(ROOT)}`" in page, f"{path.name} is not in docs/gpu.md"
            if uses.search(text):
                assert "docs/gpu.md" in text, f"{path.name} does not point to docs/gpu.md"
