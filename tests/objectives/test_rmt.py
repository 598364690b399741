"""RMT: the budget and what its length earns, the curriculum, the next-token loss beside it, and resume."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from rlpretrain.config import ConfigError
from rlpretrain.config.io import build
from rlpretrain.objectives import Setting
from rlpretrain.objectives.rmt import RMT, Config
from rlpretrain.training.loop import train
from rlpretrain.training.run import Run
from rlpretrain.types import Document
from rollout.types import FinishReason, Position, SamplingParams, Thought
from tests.builders.rpt import BPE, CLOSE, Scripted, ids
from tests.builders.runs import merged, same, trained


def rmt(**fields) -> RMT:
    objective = RMT(Config(**{"template": "{budget}{context}"} | fields), BPE)
    objective.setting = Setting(SamplingParams(max_thought_tokens=8), 2, 0.0)
    return objective


@pytest.mark.parametrize(("progress", "budget"), [(0.0, 800), (0.5, 357), (1.0, 160)])
def test_the_budget_shrinks_and_stands_in_the_prompt(progress, budget):
    objective = rmt()
    objective.progress = progress
    assert objective.budget == budget  # 800 * .2 ** progress, rounded down
    prompt = objective.prompt(Position("d", 3, ids("the cat"), ()))
    assert prompt.token_ids[: len(ids(str(budget)))] == ids(str(budget))
    objective = rmt(budget=10, budget_decay=0.01, min_budget=4)
    objective.progress = 1.0
    assert objective.budget == 4


def test_length_earns_its_share():
    """Budget 2, w = .5: thoughts of 2, 3 and 5 tokens earn 1, 1/2 and 0 for their length, the right one .5
    more.
    """
    objective = rmt(budget=2, budget_decay=1.0, length_weight=0.5)
    thoughts = [Thought((*([7] * (n - 1)), CLOSE), (-1.0,) * n, FinishReason.CLOSE, 1, n) for n in (2, 3, 5)]
    engine = Scripted(thoughts, ["\\boxed{ cat}", "\\boxed{ dog}", "\\boxed{ dog}"])
    (group,) = asyncio.run(
        objective.rollout(engine, [Position("d", 1, ids("the cat sat")[:1], ids("the cat sat")[1:])], [3])
    )
    assert group.rewards == pytest.approx((1.0, 0.25, 0.0)) and group.extra == {"budget": 2}


@pytest.mark.parametrize(
    ("progress", "bands"),
    [(0.0, {0}), (0.3, {0}), (0.4, {0, 1}), (0.5, {1}), (0.6, {1, 2}), (0.7, {2}), (1.0, {2})],
)
def test_places_get_harder(progress, bands):
    objective = rmt(positions_per_document=1, target_length=1)
    objective.progress = progress
    tokens = ids("the cat sat so so the the cat")
    entropies = torch.tensor([0.0, 0.4, 0.7, 1.2, 2.0, 0.9, 1.4, 3.0][: len(tokens)])
    kind = {i: (e >= 0.5) + (e >= 1.0) + (e >= 1.5) - 1 for i, e in enumerate(entropies.tolist())}
    rng = np.random.default_rng(0)
    found = Counter(
        kind[p.index] for _ in range(200) for p in objective.positions(Document("d", tokens), rng, entropies)
    )
    assert set(found) == bands
    if progress in (0.4, 0.6):
        assert all(60 < n < 140 for n in found.values())  # half of the way, half of the places


def test_without_a_curriculum_all_bands_are_taken():
    objective = rmt(curriculum_to=0.0, curriculum_from=0.0, positions_per_document=9, target_length=1)
    entropies = torch.tensor([0.0, 0.4, 0.7, 1.2, 2.0])
    tokens = ids("the cat sat so so the the cat")[:5]
    assert [
        p.index for p in objective.positions(Document("d", tokens), np.random.default_rng(0), entropies)
    ] == [2, 3, 4]


OBJECTIVE = {
    "name": "rmt",
    "template": "{context}",
    "opening": "shows",
    "closing": ".",
    "budget": 5,
    "min_entropy": 0.1,
    "curriculum_from": 0.0,
    "curriculum_to": 0.0,
    "target_length": 1,
}


def test_a_run_leaves_the_tokens_it_thought_about_to_the_thoughts(values):
    run = Run(build(merged(values, objective=OBJECTIVE, max_steps=4, sampling__max_thought_tokens=30)), None)
    budgets = set()
    for _ in range(3):
        batch = run.next_batch()
        budgets |= {g.extra["budget"] for g in batch.groups}
        for micro in run.pack(batch, run.count(batch)):
            scores = run.policy.score(micro)
            weights = run.objective.ntp_weights(micro, scores)
            places = [(d.id, i) for d in micro.documents for i in range(1, len(d.token_ids))]
            left_out = {p for p, w in zip(places, weights.tolist(), strict=True) if w == 0}
            assert left_out == {(g.position.document_id, g.position.index) for g in micro.groups}
    assert len(budgets) > 1  # progress reaches the objective: 5 * .2 ** (t / 4)
    run.close()


def test_progress_is_resumed(values, tmp_path):
    changes = {
        "objective": OBJECTIVE,
        "max_steps": 6,
        "checkpoint__every": 3,
        "checkpoint__keep": 9,
        "objective__length_weight": 0.5,
    }
    whole = trained(values, output_dir=str(tmp_path / "a"), **changes)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "b" / "checkpoint-6")
    assert same(whole, trained(values, resume="auto", output_dir=str(tmp_path / "b"), **changes))
    rows = [json.loads(line) for line in (Path(tmp_path) / "a" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 6


def test_bad_settings():
    with pytest.raises(ConfigError, match="must rise from min_entropy"):
        rmt(bands=(2.0, 1.0))
    with pytest.raises(ConfigError, match="comes after curriculum_to"):
        rmt(curriculum_from=0.8)


def test_the_loop_takes_it(values):
    run = Run(build(merged(values, objective=OBJECTIVE, max_steps=2)), None)
    train(run)
    run.close()
    assert run.step == 2
