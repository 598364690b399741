"""RLP really learns: from a small pretrained base, thinking comes to pay within a minute, and useless thoughts do not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from rlpretrain import Pretrainer
from rlpretrain.config_io import build
from rlpretrain.corpora import dial
from rlpretrain.documents import read_all
from rlpretrain.evaluate import evaluate
from rlpretrain.models import load_model, load_tokenizer
from rlpretrain.objectives import load

BASE = Path(__file__).parent / "data" / "dial_base"
"""The demo's base model (2000 steps of `examples/dial_base.yaml`, seed 0), stored in bfloat16."""


@pytest.mark.slow
def test_rlp_makes_thinking_pay(tmp_path):
    dial.write(tmp_path, base=10, train=2000, held_out=160, held_out_depths=(1, 2, 3, 4))
    values = yaml.safe_load((Path(__file__).parents[1] / "examples" / "dial_rlp.yaml").read_text())
    values |= {"model": str(BASE), "data": {"path": str(tmp_path / "train.jsonl"), "max_length": 128}, "max_steps": 70,
               "optim": {"lr": 3e-4}, "output_dir": str(tmp_path / "run"), "console": False,
               "policy": {"backend": "torch"}}  # fmt: skip
    config = build(values)
    ended = Pretrainer(config).train()
    assert ended["stopped"] is None

    held_out = build(values | {"data": {"path": str(tmp_path / "held_out.jsonl")}})
    tokenizer, frozen = load_tokenizer(config.model), load_model(config.model)
    objective = load(held_out, tokenizer)
    trained = load_model(build(values | {"model": ended["model"]}).model)
    documents = read_all(held_out.data, tokenizer)
    before = evaluate(frozen, objective, documents, frozen=frozen, thoughts=2, controls=False).summary()
    after = evaluate(trained, objective, documents, frozen=frozen, thoughts=2).summary()
    assert before["think_sampled"] < 0.55
    assert after["think_sampled"] > before["think_sampled"] + 0.2
    assert after["gain_frozen"] > before["gain_frozen"] + 0.4
    assert after["other"] < 0 and after["shuffled"] < after["gain_frozen"] - 0.5
    assert after["no_think_loss"] < before["no_think_loss"] + 0.05
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 70 and all(r["run/skipped_steps"] == 0 for r in rows)
