"""Coroutines are waited for in scripts and in notebooks, where an event loop runs already."""

from __future__ import annotations

import ast
import asyncio
from pathlib import Path

import pytest

from rlpretrain.cli import main
from rlpretrain.config.io import build, parse_python
from rlpretrain.training.pretrainer import Pretrainer
from rollout.blocking import wait_for_result
from tests.builders.runs import merged, same, weights

ROOT = Path(__file__).parents[2]


async def answer(value):
    await asyncio.sleep(0)
    if isinstance(value, Exception):
        raise value
    return value


def in_a_loop(call):
    """What `call` returns inside a running event loop, as a cell of a notebook is."""

    async def cell():
        return call()

    return asyncio.run(cell())


def test_results_and_errors_come_back_with_and_without_a_loop():
    assert wait_for_result(answer(3)) == in_a_loop(lambda: wait_for_result(answer(3))) == 3
    for run in (lambda call: call(), in_a_loop):
        with pytest.raises(ValueError, match="no"):
            run(lambda: wait_for_result(answer(ValueError("no"))))


def test_nothing_else_starts_a_loop():
    """`asyncio.run` alone fails in notebooks; servers and Ray's workers have processes of their own."""
    allowed = {"rollout/blocking.py", "rollout/ray_worker.py"}
    files = [path for package in ("rlpretrain", "rollout") for path in (ROOT / package).rglob("*.py")]
    found = set()
    for path in files:
        calls = [node for node in ast.walk(parse_python(path.read_text())) if isinstance(node, ast.Call)]
        if any(ast.unparse(call.func) == "asyncio.run" for call in calls):
            found.add(str(path.relative_to(ROOT)))
    assert found <= allowed


def test_a_run_with_evaluations_gives_the_same_weights_in_a_notebook(values, corpus, tmp_path, capsys):
    """It failed at its first evaluation: asyncio.run() cannot be called from a running event loop."""
    held_out = {"data": str(corpus / "held_out.jsonl"), "documents": 4, "thoughts": 2, "every": 2}
    runs = [merged(values, eval=held_out, output_dir=str(tmp_path / name)) for name in ("script", "cell")]
    script = Pretrainer(build(runs[0])).train()
    cell = in_a_loop(Pretrainer(build(runs[1])).train)
    assert script["eval/gain_frozen"] == cell["eval/gain_frozen"]
    assert same(*(weights(tmp_path / name / "model") for name in ("script", "cell")))
    assert in_a_loop(lambda: main(["report", str(tmp_path / "cell"), "--documents", "2"])) == 0
    assert (tmp_path / "cell" / "report.html").exists()
