"""Controls: random and form rewards, and next-token training on documents mixed with traces."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from rlpretrain.config import ConfigError
from rlpretrain.config.io import build
from rlpretrain.training.loop import train
from rlpretrain.training.run import Run
from rollout.types import FinishReason
from tests.builders.runs import merged

HERE = {"positions": "after", "marker": "shows"}


def test_random_rewards_depend_on_nothing_but_the_seed(values):
    groups = []
    for limit in (6, 9):  # other thoughts at the same places
        objective = {"name": "random_reward", "probability": 0.3, **HERE}
        changes = {
            "objective": objective,
            "sampling__max_thought_tokens": limit,
            "sampling__thoughts": 16,
            "positions_per_step": 32,
            "output_dir": f"{values['output_dir']}-{limit}",
        }
        run = Run(build(merged(values, **changes)), None)
        groups.append(run.next_batch().groups)
        run.close()
    assert [g.rewards for g in groups[0]] == [g.rewards for g in groups[1]]
    assert [g.thoughts for g in groups[0]] != [g.thoughts for g in groups[1]]
    tosses = np.array([g.rewards for g in groups[0]])
    assert set(np.unique(tosses)) == {0, 1} and 0.2 < tosses.mean() < 0.4
    assert len({g.rewards for g in groups[0]}) > 25


def test_form_alone_is_rewarded(values):
    objective = {"name": "format_only", "least": 4, **HERE}
    changes = {"objective": objective, "sampling__max_thought_tokens": 60, "positions_per_step": 8}
    run = Run(build(merged(values, **changes)), None)
    groups = run.next_batch().groups
    for group in groups:
        for thought, reward in zip(group.thoughts, group.rewards, strict=True):
            assert reward == (thought.finish_reason is FinishReason.CLOSE and len(thought.token_ids) >= 4)
    assert {0.0, 1.0} == {r for g in groups for r in g.rewards}
    run.close()


def test_a_form_is_learnt_and_gains_are_logged(values):
    changes = {"objective": {"name": "format_only", **HERE}, "sampling__thoughts": 8, "max_steps": 40}
    run = Run(build(merged(values, **changes)), None)
    train(run)
    run.close()
    rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert np.mean([r["reward"] for r in rows[-5:]]) > np.mean([r["reward"] for r in rows[:5]]) + 0.3
    assert "ig/mean" in rows[0]


def traces(folder) -> dict:
    rows = [{"question": f"ann has {i}", "answer": "<think> 3 </think> shows 7 ."} for i in range(10)]
    (folder / "traces.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "path": str(folder / "traces.jsonl"),
        "column": "question",
        "answer_column": "answer",
        "answer_join": " bob",
    }


def test_documents_and_traces_are_mixed(values, tmp_path):
    changes = {
        "objective": {"name": "sft_mixed", "share": 0.25},
        "ntp_data": traces(tmp_path),
        "positions_per_step": 8,
    }
    run = Run(build(merged(values, **changes)), None)
    batch = run.next_batch()
    given = [d for d in batch.documents if d.id.startswith("ntp ")]
    assert len(given) == 2 and len(batch.documents) == 8 and not batch.groups
    (micro,) = run.pack(batch, run.count(batch))
    scores = run.policy.score(micro)
    weights = run.objective.ntp_weights(micro, scores).split([len(d.token_ids) - 1 for d in micro.documents])
    for document, mine in zip(micro.documents, weights, strict=True):
        prompt = 4 if document in given else 0  # ann has i bob
        assert mine.tolist() == [float(k >= prompt) for k in range(1, len(document.token_ids))]
    labels = dict(
        zip([d.id for d in micro.documents], micro.trunk_labels.split([len(w) for w in weights]), strict=True)
    )
    assert all(
        tuple(labels[d.id].tolist()) == d.token_ids[1:] for d in micro.documents
    )  # the order that the weights assume
    answers = scores.trunk_logps.detach()[torch.cat(weights) > 0]
    run.close()
    run = Run(build(merged(values, **changes, max_steps=1, output_dir=str(tmp_path / "one"))), None)
    train(run)  # the same first batch
    run.close()
    assert run.last["ntp/trained_loss"] == pytest.approx(-float(answers.mean()), rel=1e-6)
    assert run.last["ntp/trained_loss"] != pytest.approx(run.last["ntp/loss"], rel=1e-4)


def test_traces_are_needed(values):
    with pytest.raises(ConfigError, match="SFTMixed needs a second stream of documents: set ntp_data"):
        Run(build(merged(values, objective="sft_mixed")), None)
