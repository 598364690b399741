"""`needs: {"target_baseline"}`: log-probs of the targets after the thoughts under the baseline's model."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from rlpretrain.config.io import build
from rlpretrain.objectives import rlp
from rlpretrain.training.loop import train
from rlpretrain.training.run import Run
from rlpretrain.types import MicroBatch, Scores
from tests.builders.runs import merged, same, trained


class Recording(rlp.RLP):
    """RLP that keeps its scores, and the weights of the baseline's model at that time."""

    needs = frozenset({"target", "target_baseline"})
    seen: list[tuple[MicroBatch, Scores, Any]] = []
    model: Any = None

    def trunk_loss(self, micro, scores):
        self.seen.append((micro, scores.detached(), copy.deepcopy(self.model)))
        return super().trunk_loss(micro, scores)


class Bottleneck(Recording):
    """A scorer that sees thoughts without their contexts."""

    def baseline_prompt(self, group):
        return replace(group.prompt, token_ids=group.prompt.token_ids[-1:])


def run_of(values: dict[str, Any], name: str, baseline: str, **changes: Any) -> Run:
    Recording.seen = []
    settings = {"name": baseline, "decay": 0.5, "frozen_every": 0}
    config = merged(values, objective__name=f"{__name__}:{name}", objective__target_length=2, **changes)
    run = Run(build(config | {"baseline": settings}), None)
    run.objective.model = getattr(run.baseline, "model", None)
    train(run)
    run.close()
    return run


@pytest.mark.parametrize("packing", ["tree", "padded"])
@pytest.mark.parametrize("baseline", ["self", "frozen", "ema"])
def test_the_policys_rows_under_equal_weights(values, packing, baseline):
    """Exactly its own numbers at first, and always if the baseline is the policy."""
    run_of(values, "Recording", baseline, packing=packing, max_steps=2, token_budget=60)
    firsts = [scores for _, scores, _ in Recording.seen]
    assert firsts and firsts[0].target_logps.any()
    assert torch.equal(firsts[0].target_baseline, firsts[0].target_logps)
    apart = float((firsts[-1].target_baseline - firsts[-1].target_logps).abs().max())
    assert (apart == 0) == (baseline == "self")


@pytest.mark.parametrize("name", ["Recording", "Bottleneck"])
@pytest.mark.parametrize(("packing", "budget"), [("tree", 16384), ("padded", 60)])
def test_after_updates_it_has_the_numbers_of_its_own_model(values, name, packing, budget):
    """Against transformers' logits of each sequence alone, with the average's weights at that step."""
    run_of(values, name, "ema", packing=packing, max_steps=2, token_budget=budget, sampling__temperature=0.7)
    micro, scores, model = Recording.seen[-1]
    model.set_attn_implementation("eager")
    checked = 0
    for b, group in enumerate(micro.groups):
        head = group.prompt.token_ids[-1:] if name == "Bottleneck" else group.prompt.token_ids
        target = group.position.target_ids
        for g, thought in enumerate(group.thoughts):
            closed = thought.finish_reason == "close"
            before = (*head, *thought.token_ids, *(() if closed else group.prompt.close_ids))
            with torch.no_grad():
                logits = model(torch.tensor([(*before, *target)])).logits[0, len(before) - 1 : -1]
            wanted = logits.log_softmax(-1).gather(-1, torch.tensor(target)[:, None])[:, 0]
            assert torch.allclose(scores.target_baseline[b, g], wanted, atol=1e-5)
            checked += 1
    assert checked


def test_a_scorer_that_no_reward_uses_changes_no_weight(values, tmp_path):
    lora = {"backend": "torch", "lora": {"r": 4}}
    common = {"baseline": {"name": "frozen", "frozen_every": 0}, "policy": lora, "max_steps": 2}
    plain = trained(values, output_dir=str(tmp_path / "plain"), **common)
    config = merged(values, objective__name=f"{__name__}:Bottleneck", output_dir=str(tmp_path / "scored"))
    assert same(plain, trained(config, **common))
