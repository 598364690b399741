"""A base that never saw the tags (issue 15.21): the default settings learn from it, and where a run cannot
learn, it says so.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlpretrain import Pretrainer
from rlpretrain.config import SamplingConfig
from rlpretrain.config.io import build
from rlpretrain.reporting.report import report
from rlpretrain.tracking.health import Health
from tests.builders.tiny import bpe_tokenizer, tiny_model

TEXTS = [
    f"the {a} has {n} and the {b} shows {n}" for n in range(10) for a, b in (("cat", "dog"), ("fox", "hen"))
]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a byte-level tokenizer without tags, and documents beside it."""
    folder = tmp_path_factory.mktemp("plain")
    tokenizer = bpe_tokenizer(TEXTS, 300)
    tiny_model("llama", vocab_size=len(tokenizer)).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    (folder / "docs.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return folder


def train(plain: Path, out: Path, **changes: Any) -> list[dict[str, Any]]:
    values = {
        "model": str(plain / "base"),
        "data": str(plain / "docs.jsonl"),
        "output_dir": str(out),
        "positions_per_step": 2,
        "sampling": {"thoughts": 3, "max_thought_tokens": 4},
        "optim": {"lr": 1e-3, "warmup_steps": 0},
        "max_steps": 4,
        "policy": {"backend": "torch"},
        "baseline": {"frozen_every": 2},
        "checkpoint": {"every": 0},
        "device": "cpu",
    }
    values["sampling"] |= changes.pop("sampling", {})
    Pretrainer(build(values | changes)).train()
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def policy_gradient(rows: list[dict[str, Any]]) -> bool:
    """Whether any step had groups whose thoughts earned differently."""
    return any(row.get("reward_std", 0.0) > 0 for row in rows)


def test_the_defaults_train_the_policy(plain, tmp_path, capsys):
    rows = train(plain, tmp_path / "run")
    assert all(row["thought/closed_frac"] < 0.5 for row in rows), "this base is to close few thoughts"
    assert policy_gradient(rows) and all(row["thought/uncounted_frac"] == 0 for row in rows)
    assert "warning" not in capsys.readouterr().out
    assert SamplingConfig().cut == "penalise"


def test_no_thought_that_counts_is_said_while_it_goes_on_and_in_the_report(plain, tmp_path, capsys):
    rows = train(plain, tmp_path / "run", sampling={"cut": "mask", "max_thought_tokens": 2})
    said = " ".join(capsys.readouterr().out.split())
    assert not policy_gradient(rows), "nothing to learn from: the case that must be warned of"
    assert "warning, step 3: No thought counts" in said and "sampling.cut: penalise" in said
    (warning,) = json.loads((tmp_path / "run" / "run.json").read_text())["warnings"]
    assert (warning["rule"], warning["step"]) == ("no thought counts", 3)
    page = report(tmp_path / "run").read_text()
    assert "Step 3: No thought counts" in page


def test_the_gain_of_an_empty_thought_is_the_models_own(plain, tmp_path):
    """ig/empty is log p(target | context, open, close) − log p(target | context), by full logits."""
    out = tmp_path / "run"
    rows = train(plain, out, save_rollouts=True, optim={"lr": 0.0}, max_steps=1)
    model = AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float32).eval()
    from rollout.store import Store

    groups = Store(out / "rollouts").read(1)[0]

    def logp(context: tuple[int, ...], target: tuple[int, ...]) -> float:
        with torch.no_grad():
            logps = model(torch.tensor([[*context, *target]])).logits[0].log_softmax(-1)
        return sum(float(logps[len(context) - 1 + k, token]) for k, token in enumerate(target))

    gains = []
    for group in groups:
        empty = (*group.prompt.token_ids, *group.prompt.close_ids)
        target = group.position.target_ids
        gains.append(logp(empty, target) - logp(group.position.context_ids, target))
    assert rows[0]["ig/empty"] == pytest.approx(sum(gains) / len(gains), abs=1e-5)
    assert "ig/frozen" in rows[0]


def test_a_resumed_run_does_not_repeat_its_warnings(plain, tmp_path, capsys):
    out = tmp_path / "run"
    mask = {"sampling": {"cut": "mask", "max_thought_tokens": 2}, "checkpoint": {"every": 4}}
    train(plain, out, **mask)
    capsys.readouterr()
    values = json.loads((out / "run.json").read_text())["config"] | {"max_steps": 6}
    Pretrainer(build(values)).train(resume="auto")
    assert "No thought counts" not in capsys.readouterr().out
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [f.step for f in Health().replay(rows)] == [3] and len(rows) == 6
