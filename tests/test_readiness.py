"""A dry run's estimates against what a run takes, and what it says of the machine (issue 15.24)."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rlpretrain.cli import main
from rlpretrain.config.io import build
from rlpretrain.corpora import dial
from rlpretrain.prompts import Delimiters
from rlpretrain.tools import readiness
from rlpretrain.tools.dry_run import make_objective, model_shape
from rlpretrain.tools.memory import GIB, memory, peak
from rlpretrain.tools.sizes import make_sizes, measure_documents
from rlpretrain.tools.speed import format_duration, measure_speed
from tests.builders.configs import written
from tests.builders.runs import ROOT, alone, merged
from tests.builders.tiny import tiny_model

MEASURE = """
import json, re, sys
from rlpretrain import Pretrainer
from rlpretrain.config.io import build
Pretrainer(build(json.loads(sys.argv[1]))).train()
# ru_maxrss would include the peak of the test's own process
print(int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024)
"""


def estimated(values: dict[str, Any]) -> float:
    """The peak that a dry run names, in bytes."""
    config = build(values)
    objective, shape = make_objective(config, []), model_shape(config.model, Path())[0]
    sizes = make_sizes(config, objective, shape, [], measure_documents(config, objective, []))
    return peak(memory(config, shape, sizes))


@pytest.mark.parametrize("packing", ["tree", "padded"])
def test_the_memory_estimate_is_near_what_a_run_takes(packing, values, tmp_path):
    """In a process of its own: its largest resident set, libraries included."""
    shape = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 6, "head_dim": 48}
    model = tiny_model("qwen3", len(dial.WORDS), max_position_embeddings=1024, **shape)
    model.save_pretrained(tmp_path / "model")
    dial.tokenizer().save_pretrained(tmp_path / "model")
    text = " ".join([dial.WORDS[5]] * 250)
    (tmp_path / "docs.jsonl").write_text(2 * (json.dumps({"text": text}) + "\n"))
    values = merged(
        values,
        model=str(tmp_path / "model"),
        data__path=str(tmp_path / "docs.jsonl"),
        data__max_length=512,
        objective="rlp",
        positions_per_step=4,
        sampling__thoughts=8,
        sampling__max_thought_tokens=16,
        max_steps=2,
        packing=packing,
    )
    command = [sys.executable, "-c", MEASURE, json.dumps(values)]
    done = subprocess.run(
        command, cwd=ROOT, env=alone() | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-2000:]
    taken = int(done.stdout.split()[-1])
    assert 0.7 < estimated(values) / taken < 1.6, (
        f"{estimated(values) / GIB:.2f} GiB said, {taken / GIB:.2f} taken"
    )


def test_the_schedules_own_bound_on_tokens_counts(values):
    """A step of few thoughts never fills the token budget, whatever that is."""
    values = merged(values, token_budget=16384)
    config = build(values)
    objective, shape = make_objective(config, []), model_shape(config.model, Path())[0]
    longest = measure_documents(config, objective, [])
    assert longest is not None and longest < 64  # the documents are here: their lengths are known
    few = make_sizes(config, objective, shape, [], longest)
    assert few.micro < 4 * (longest + 4 * 10 + 10) and few.longest == longest
    many = make_sizes(build(merged(values, positions_per_step=4096)), objective, shape, [], longest)
    assert many.micro == 16384
    assert (
        make_sizes(build(merged(values, packing="padded")), objective, shape, [], longest).micro > few.micro
    )


def test_what_the_machine_lacks_is_said(values, tmp_path, monkeypatch, capsys):
    config = build(values)
    objective, shape = make_objective(config, []), model_shape(config.model, Path())[0]
    sizes = make_sizes(config, objective, shape, [])
    assert readiness.notes(config, objective.config, sizes, 1.0, True) == []
    assert 2**28 < readiness.memory_here("cpu") < 2**44
    (said,) = readiness.memory_note(2.0**50, sizes)
    assert "needs up to 1048576.0 GiB, and cpu has" in said and "lower token_budget" in said
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert readiness.memory_note(readiness.memory_here("cpu") / 2, sizes)[0].startswith("4 ranks need")
    (said,) = readiness.disk_note(
        replace(config, output_dir=str(tmp_path / "a" / "b")), replace(sizes, parameters=10**15)
    )
    assert f"and {tmp_path} has" in said and "checkpoint.keep" in said
    assert readiness.disk_needed(
        replace(config, checkpoint=replace(config.checkpoint, every=1)), sizes
    ) > readiness.disk_needed(config, sizes)


@pytest.mark.parametrize(
    ("changes", "absent", "said"),
    [
        ({"engine": "vllm_local"}, "vllm", "engine vllm_local needs vllm"),
        ({"engine": {"name": "ray", "of": "hf"}}, "ray", "engine ray needs ray"),
        ({"engine": {"name": "ray"}}, "vllm", "engine ray needs vllm"),
        (
            {"engine": {"name": "vllm_server", "urls": ["http://x"]}},
            "httpx",
            "engine vllm_server needs httpx",
        ),
        ({"policy": {"backend": "deepspeed"}}, "deepspeed", "policy.backend deepspeed needs deepspeed"),
        ({"policy": {"lora": {}}}, "peft", "policy.lora needs peft"),
        ({"report_to": ["wandb"]}, "wandb", "report_to wandb needs wandb"),
        ({"report_to": ["trackio"]}, "trackio", "report_to trackio needs trackio"),
    ],
)
def test_missing_extras_are_named_with_their_install_line(values, monkeypatch, changes, absent, said):
    config, there = build(merged(values, **changes)), importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == absent else there(name) or object()
    )
    (note,) = readiness.missing_libraries(config, thinks=True)
    assert note.startswith(said) and "pip install" in note
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: there("json"))
    assert readiness.missing_libraries(config, thinks=True) == []


def test_servers_that_take_no_connection_are_named(values):
    with socket.socket() as open_one, socket.socket() as closed:
        for s in (open_one, closed):
            s.bind(("127.0.0.1", 0))
        open_one.listen()
        there, gone = (f"http://127.0.0.1:{s.getsockname()[1]}" for s in (open_one, closed))
        config = build(merged(values, engine={"name": "vllm_server", "urls": [there, gone]}))
        (said,) = readiness.silent_servers(config, None, True)
        assert said.startswith(f"engine.urls {gone} cannot be reached: ")
        judged = build(merged(values, objective={"name": "rlpt", "reward": "judge", "judge_url": gone}))
        section = make_objective(judged, []).config
        assert readiness.silent_servers(judged, section, True)[0].startswith("objective.judge_url")


def test_absent_tags_are_said(values):
    tokenizer = dial.tokenizer()
    (said,) = readiness.missing_tags(tokenizer, Delimiters("<reason>", dial.WORDS[5]))
    assert "lacks <reason>: they are added" in said
    assert readiness.missing_tags(tokenizer, None) == []


def test_a_time_is_estimated(values, tmp_path, capsys):
    before = dict(os.environ)
    speed = measure_speed("cpu", torch.float32)
    assert 1e8 < speed.flops < 1e14 and 1e7 < speed.bandwidth < 1e13
    assert [format_duration(s) for s in (3.21, 300, 10000, 400000)] == [
        "3.2 seconds",
        "5.0 minutes",
        "2.8 hours",
        "4.6 days",
    ]
    assert main(["train", written(values, tmp_path), "--dry-run"]) == 0
    assert "time on this machine, roughly" in capsys.readouterr().out
    assert {name: os.environ[name] for name in before if name in os.environ} == before, (
        "a dry run leaves the environment alone"
    )
