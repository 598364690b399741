"""`needs: {"reference"}`: log-probs of trunk and thoughts under the frozen initial model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from rlpretrain.config.io import build
from rlpretrain.objectives import rlp
from rlpretrain.reporting.report import add_thoughts, read_run
from rlpretrain.scoring.references import Frozen, Reference
from rlpretrain.training.loop import train
from rlpretrain.training.run import Run
from rlpretrain.types import MicroBatch, Scores
from tests.builders.runs import merged, same, trained


class Recording(rlp.RLP):
    """RLP that keeps the scores its next-token loss was given."""

    needs = frozenset({"target", "reference"})
    seen: list[tuple[MicroBatch, Scores]] = []

    def trunk_loss(self, micro, scores):
        self.seen.append((micro, scores.detached()))
        return super().trunk_loss(micro, scores)


def run_of(values: dict[str, Any], **changes: Any) -> Run:
    Recording.seen = []
    return Run(build(merged(values, objective__name=f"{__name__}:Recording", **changes)), None)


def apart(scores: Scores) -> tuple[float, float]:
    """Largest difference (nats) between policy and reference, on trunk and thoughts."""
    assert scores.trunk_reference is not None and scores.thought_reference is not None
    trunk = (scores.trunk_logps - scores.trunk_reference).abs().max()
    thoughts = (scores.thought_logps - scores.thought_reference).abs().max()
    return float(trunk), float(thoughts)


@pytest.mark.parametrize("packing", ["tree", "padded"])
@pytest.mark.parametrize("lora", [None, {"r": 4}])
def test_the_reference_is_the_initial_model(values, packing, lora):
    policy = {"backend": "torch", "lora": lora}
    run = run_of(values, packing=packing, policy=policy, sampling__temperature=0.7)
    initial = copy.deepcopy(run.frozen.model) if lora is None else None
    train(run)
    run.close()
    first, last = Recording.seen[0][1], Recording.seen[-1][1]
    assert first.trunk_logps.numel() and first.thought_logps.numel()
    assert max(apart(first)) < 1e-5  # before the first update both are the initial model
    assert min(apart(last)) > 1e-3
    if initial is None:
        return
    micro, scores = Recording.seen[-1]
    again = Reference(Frozen(initial), 0.7)(scores, micro)
    assert torch.equal(again.trunk_reference, scores.trunk_reference)
    assert torch.equal(again.thought_reference, scores.thought_reference)


def test_a_reference_that_no_loss_uses_changes_no_weight(values, tmp_path):
    plain = trained(values, output_dir=str(tmp_path / "plain"))
    with_reference = trained(
        values, output_dir=str(tmp_path / "reference"), objective__name=f"{__name__}:Recording"
    )
    assert same(plain, with_reference)


def test_its_forwards_are_counted(values, tmp_path):
    counts = {}
    for name in ("rlp", f"{__name__}:Recording"):
        run = Run(
            build(merged(values, objective__name=name, max_steps=1, output_dir=str(tmp_path / name[-9:]))),
            None,
        )
        train(run)
        run.close()
        counts[name] = run.last["num_tokens"]
    tokens = sum(m.input_ids.numel() for m, _ in Recording.seen[-1:])
    assert counts[f"{__name__}:Recording"] == counts["rlp"] + tokens


class Unlikely(rlp.RLP):
    """A trunk loss that is not linear in log p: −log(1 − p)."""

    def trunk_loss(self, micro, scores):
        return -torch.log1p(-scores.trunk_logps.exp().clamp(max=1 - 1e-6))


def test_a_trunk_loss_of_an_objective_is_what_is_trained(values, tmp_path):
    def text_loss(name: str) -> float:
        run = Run(
            build(
                merged(
                    values,
                    objective__name=name,
                    loss={"policy_coef": 0.0, "reader_coef": 0.0, "ntp_coef": 1.0},
                    max_steps=8,
                    output_dir=str(tmp_path / name[-8:]),
                )
            ),
            None,
        )
        train(run)
        run.close()
        return run.last["ntp/loss"]

    assert text_loss(f"{__name__}:Unlikely") > text_loss("rlp") + 0.1


class NeedsReference(rlp.RLP):
    """A reward with a KL penalty, which cannot be computed without the reference."""

    needs = frozenset({"target", "reference"})

    def reward(self, groups, scores):
        log_ratio = (scores.thought_logps - scores.thought_reference).sum(-1)
        return super().reward(groups, scores) - 0.1 * log_ratio


def test_a_report_of_a_run_with_a_reference(values, tmp_path):
    """Without the run there is no reference: the report shows the gains, and no rewards of its own."""
    run = tmp_path / "run"
    trained(values, output_dir=str(run), objective__name=f"{__name__}:NeedsReference", save_rollouts=True)
    contents = read_run(run)
    add_thoughts(contents, run, None, 2, None)
    assert contents.documents and not contents.missing
