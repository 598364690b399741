"""What README and AGENTS show works as printed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from rlpretrain import Pretrainer
from rlpretrain.config.io import build
from rlpretrain.objectives import base

ROOT = Path(__file__).parents[1]


def blocks(file: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / file).read_text(), re.S)


def test_the_readme_stays_short():
    """One and a half screens of text, and what must run as printed."""
    text = (ROOT / "README.md").read_text()
    prose = re.sub(r"```.*?```", "", text, flags=re.S)
    assert len(prose.splitlines()) <= 75 and len(text.splitlines()) <= 120


def test_the_readme_configuration_is_valid():
    (text,) = blocks("README.md", "yaml")
    config = build(yaml.safe_load(text))
    assert config.model.path == "Qwen/Qwen3-1.7B-Base" and config.sampling.thoughts == 16


def test_the_readme_python_trains(corpus, tmp_path, monkeypatch):
    """As printed, but for what makes it small."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").symlink_to(corpus / "base")
    (tmp_path / "docs.jsonl").symlink_to(corpus / "train.jsonl")
    text = blocks("README.md", "python")[0]
    small = (
        "max_steps=1, positions_per_step=2, console=False, "
        'sampling={"thoughts": 2, "max_thought_tokens": 4, "cut": "force_close"}'
    )
    assert "max_steps=100" in text
    exec(compile(text.replace("max_steps=100", small), "README.md", "exec"), {})
    assert (tmp_path / "runs" / "rlp" / "model" / "model.safetensors").exists()


def test_the_readmes_trl_plug_in_trains(corpus, tmp_path, monkeypatch):
    """As printed, but for what makes it small."""
    pytest.importorskip("trl")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").symlink_to(corpus / "base")
    (tmp_path / "docs.jsonl").symlink_to(corpus / "train.jsonl")
    text = blocks("README.md", "python")[1]
    small = 'max_steps=1, use_cpu=True, bf16=False, report_to="none", logging_steps=1'
    assert "max_steps=100" in text and "max_completion_length=256" in text
    text = text.replace("max_steps=100", small).replace(
        "max_completion_length=256", "max_completion_length=6"
    )
    exec(compile(text, "README.md", "exec"), {})
    state = json.loads((tmp_path / "runs" / "grpo" / "checkpoint-1" / "trainer_state.json").read_text())
    assert "rewards/information_gain/mean" in state["log_history"][0]


def test_the_objective_in_agents_md_trains(values, tmp_path, monkeypatch):
    (text,) = blocks("AGENTS.md", "python")
    (tmp_path / "mine_from_agents_md.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    values["objective"] = {
        "name": "mine_from_agents_md:Mine",
        "positions": "after",
        "marker": "shows",
        "margin": 0.2,
    }
    assert Pretrainer(build(values)).train()["steps"] == 3
    assert issubclass(__import__("mine_from_agents_md").Mine, base.Objective)
