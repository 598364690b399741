"""RLP and RPT really learn: after some steps from a small pretrained base, thoughts help."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from rlpretrain import Pretrainer
from rlpretrain.config.io import build
from rlpretrain.corpora import dial, dial_family
from rlpretrain.data.stream import read_all
from rlpretrain.evaluation.evaluate import evaluate
from rlpretrain.experiments.compare import compare
from rlpretrain.models import load_model, load_tokenizer
from rlpretrain.objectives import load_objective
from tests.builders.learning import BASE
from tests.builders.processes import warm

FAMILY_BASE = BASE.parent / "family_base"
"""The base of `examples/dial_family` (base.yaml), stored in bfloat16."""
FAMILY = Path(__file__).parents[1] / "examples" / "dial_family"


@pytest.mark.slow
def test_rlp_makes_thinking_pay(tmp_path):
    dial.write(tmp_path, base=10, train=2000, held_out=96, held_out_depths=(1, 2, 3, 4))
    values = yaml.safe_load((Path(__file__).parents[1] / "examples" / "dial_rlp.yaml").read_text())
    values |= {
        "model": str(BASE),
        "data": {"path": str(tmp_path / "train.jsonl"), "max_length": 128},
        "max_steps": 24,
        "optim": {"lr": 5e-4},
        "output_dir": str(tmp_path / "run"),
        "console": False,
        "policy": {"backend": "torch"},
    }
    config = build(values)
    ended = Pretrainer(config).train()
    assert ended["stopped"] is None

    held_out = build(values | {"data": {"path": str(tmp_path / "held_out.jsonl")}})
    tokenizer, frozen = load_tokenizer(config.model), load_model(config.model)
    objective = load_objective(held_out, tokenizer)
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
    assert len(rows) == 24 and all(r["run/skipped_steps"] == 0 for r in rows)


@pytest.mark.slow
def test_a_short_comparison_learns(tmp_path):
    """RPT learns from the base of `examples/dial_family`; next-token prediction on its compute does not."""
    dial_family.write(tmp_path / "corpus", base=1, train=2000, held_out=48, held_out_depths=(1, 2, 3, 4))
    experiment = yaml.safe_load((FAMILY / "compare.yaml").read_text())
    methods = {name: experiment["methods"][name] for name in ("rpt", "ntp_flops")}
    for method in methods.values():
        method["config"] = str(FAMILY / method["config"])
    methods["ntp_flops"]["like"] = "rpt"
    experiment |= {
        "methods": methods,
        "seeds": [0],
        "output_dir": str(tmp_path / "compared"),
        "common": {
            "model": str(FAMILY_BASE),
            "data": str(tmp_path / "corpus" / "train.jsonl"),
            "max_steps": 24,
            "optim": {"lr": 4e-4},
            "device": "cpu",
        },
    }
    held_out = {"path": str(tmp_path / "corpus" / "held_out.jsonl"), "max_length": 128}
    experiment["evaluation"] |= {"data": held_out, "documents": 48}
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(experiment))
    warm()
    rows = compare(tmp_path / "experiment.yaml")["methods"]
    base, rpt, ntp = (rows[name] for name in ("base", "rpt", "ntp_flops"))
    assert base["think_sampled"][0] < 0.6
    assert rpt["think_sampled"][1] > base["think_sampled"][2] + 0.1  # the intervals do not overlap
    assert rpt["own"]["after"][1] > rpt["own"]["before"][2]
    assert rpt["shuffled"][0] < rpt["gain_frozen"][0] - 0.5
    assert ntp["think_sampled"][0] < base["think_sampled"][2]
    assert ntp["spent"]["flops"] >= rpt["spent"]["flops"]
