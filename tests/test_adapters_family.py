"""Every objective trains adapters: its first gradient is that of all weights, seen through the adapters."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlpretrain.corpora import dial_family
from rlpretrain.objectives import available
from rlpretrain.training.run import Run
from rollout.types import Group
from tests.builders.runs import merged, one_step
from tests.builders.tiny import tiny_model

pytest.importorskip("peft", reason="needs PEFT: make env LOCK=test-cpu")
FAMILY = Path(__file__).parents[1] / "examples" / "dial_family"
NAMES = sorted(f.stem for f in FAMILY.glob("*.yaml") if f.stem != "base" and "methods:" not in f.read_text())
LORA = {"r": 4, "alpha": 12, "target_modules": ("q_proj", "down_proj")}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus in every method's format, and `base/`: a random model of its words."""
    folder = tmp_path_factory.mktemp("family")
    dial_family.write(folder, base=1, train=40, held_out=4)
    tokenizer = dial_family.tokenizer()
    tiny_model("qwen3", vocab_size=len(tokenizer), seed=5, initializer_range=0.3).save_pretrained(
        folder / "base"
    )
    tokenizer.save_pretrained(folder / "base")
    return folder


def values(name: str, family: Path, out: Path) -> dict[str, Any]:
    """An example's configuration, smaller, with the frozen model as its baseline."""
    found = yaml.safe_load((FAMILY / f"{name}.yaml").read_text())
    for source in ("data", "ntp_data"):
        if source in found:
            found[source]["path"] = str(family / Path(found[source]["path"]).name)
    if "feedback" in found["objective"]:
        feedback = found["objective"]["feedback"]
        feedback["path"] = str(family / Path(feedback["path"]).name)
    if "reference" in found:
        found["reference"] = str(family / "base")
    if found["objective"] != "ntp" and "min_entropy" in found["objective"]:
        found["objective"] |= {
            "min_entropy": 0.0,
            "bands": [90.0, 99.0],
        }  # a random model finds all of it hard
    return merged(
        found,
        model=str(family / "base"),
        output_dir=str(out),
        positions_per_step=4,
        policy={"backend": "torch"},
        device="cpu",
        sampling__thoughts=3,
        sampling__max_thought_tokens=5,
        baseline={"name": "frozen"},
        console=False,
    )


def right_by_turns(run: Run) -> None:
    """A random model is never right. Rewards that are stored with its thoughts are 0, 1, 0, ... here, so
    that they differ.
    """
    inner = run.objective.rollout

    async def rollout(*args: Any) -> list[Group]:
        return [
            g
            if g.rewards is None
            else replace(g, rewards=tuple(float(i % 2) for i in range(len(g.thoughts))))
            for g in await inner(*args)
        ]

    run.objective.rollout = rollout


def test_every_objective_has_an_example():
    sections = [yaml.safe_load((FAMILY / f"{name}.yaml").read_text())["objective"] for name in NAMES]
    named = {s if isinstance(s, str) else s["name"] for s in sections}
    elsewhere = {"verified", "sip"}  # in examples/graphs and examples/sip
    assert named | elsewhere == set(available())


@pytest.mark.parametrize("name", NAMES)
def test_the_first_gradient_is_that_of_all_weights(name, family, tmp_path):
    """B begins at 0, so dL/dB is alpha / r · dL/dW Aᵀ and dL/dA is 0; no other weight has a gradient."""
    full, gradient = one_step(values(name, family, tmp_path / "full"), right_by_turns)
    adapted, ours = one_step(
        values(name, family, tmp_path / "lora"), right_by_turns, policy={"backend": "torch", "lora": LORA}
    )
    logged = [
        json.loads((tmp_path / folder / "metrics.jsonl").read_text().splitlines()[-1])
        for folder in ("full", "lora")
    ]
    if full.objective.has_positions:
        assert logged[0]["reward_std"] > 0 and logged[1]["reward_std"] == pytest.approx(
            logged[0]["reward_std"]
        )
    assert ours.keys() == {
        n for n, p in adapted.policy.model.named_parameters() if "lora_" in n and p.requires_grad
    }
    start = {n: p.detach() for n, p in adapted.policy.model.named_parameters()}
    seen = 0
    for n, got in ours.items():
        if ".lora_A." in n:
            assert not got.any()
            continue
        plain = n.replace("base_model.model.", "").replace(".lora_B.default", "")
        wanted = (
            3.0 * gradient[plain] @ start[n.replace("lora_B", "lora_A")].T
        )  # one step leaves A where it was
        assert float((got - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())
        seen += bool(wanted.any())
    assert seen == len(ours) / 2
