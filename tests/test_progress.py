"""How far the run is: each batch's own, for its positions, prompts, rewards and losses (issue 15.7)."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest

from rlpretrain import Pretrainer
from rlpretrain.config.io import build
from rlpretrain.objectives import ntp, rmt
from rlpretrain.reporting.report import inspect
from rlpretrain.reporting.thoughts import PARTS
from rlpretrain.training.loop import train
from rlpretrain.training.run import Run
from rollout.store import Store
from tests.builders.runs import merged

STEPS = 6
RMT = {
    "name": "rmt",
    "template": "{budget} {context}",
    "opening": "shows",
    "closing": ".",
    "budget": 9,
    "budget_decay": 0.2,
    "min_entropy": 0.0,
    "curriculum_from": 0.0,
    "curriculum_to": 0.0,
    "target_length": 1,
    "length_weight": 0.5,
    "dynamic_sampling": False,
}


class Noting(rmt.RMT):
    """RMT that notes what it knew of the run's progress in each hook."""

    def positions(self, document, rng, trunk=None):
        self.__dict__.setdefault("drawn", []).append(self.progress)
        return super().positions(document, rng, trunk)

    def select(self, groups):
        self.__dict__.setdefault("selected", []).append(self.progress)
        return super().select(groups)

    def advantage(self, reward, groups):
        self.__dict__.setdefault("trained", []).append(self.progress)
        return super().advantage(reward, groups)

    def ntp_weights(self, micro, scores):
        self.__dict__.setdefault("trained", []).append(self.progress)
        return super().ntp_weights(micro, scores)


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_prompt_and_reward_have_the_budget_of_their_batch(values, ahead):
    """With stale thoughts, 900 tokens were due, the prompt said 417 and the reward was for 193."""
    objective = RMT | {"name": "tests.test_progress:Noting"}
    run = Run(
        build(
            merged(
                values,
                objective=objective,
                max_steps=STEPS,
                save_rollouts=True,
                engine__max_staleness=ahead,
                engine__in_flight=2,
            )
        ),
        None,
    )
    train(run)
    run.close()
    for step in range(1, STEPS + 1):
        due = max(1, math.floor(9 * 0.2 ** ((step - 1) / STEPS)))
        groups, *_ = Store(run.folder / "rollouts").read(step)
        assert {g.extra["budget"] for g in groups} == {due}
        assert {run.tokenizer.decode(g.prompt.token_ids[:1]) for g in groups} == {str(due)}
        for group in groups:
            lengths = [t.answer_span[0] if t.answer_span else len(t.token_ids) for t in group.thoughts]
            near = [0.5 * max(0.0, 1 - abs(n - due) / due) for n in lengths]
            hits = [r - n for r, n in zip(group.rewards, near, strict=True)]
            assert all(h == pytest.approx(0.0) or h == pytest.approx(0.5) for h in hits)
    wanted = [step / STEPS for step in range(STEPS)]
    assert run.objective.selected == wanted and sorted(set(run.objective.drawn)) == wanted
    assert sorted(set(run.objective.trained)) == wanted and run.objective.trained == sorted(
        run.objective.trained
    )


class Clock(ntp.NTP):
    """Next-token prediction that knows how far the run is."""

    def mix(self, documents):
        self.__dict__.setdefault("mixed", []).append(self.progress)
        return super().mix(documents)

    def ntp_weights(self, micro, scores):
        self.__dict__.setdefault("weighed", []).append(self.progress)
        return super().ntp_weights(micro, scores)


def test_an_objective_without_positions_knows_the_progress(values):
    changes = {
        "objective": "tests.test_progress:Clock",
        "max_steps": 4,
        "checkpoint__every": 2,
        "checkpoint__keep": 9,
    }
    run = Run(build(merged(values, **changes)), None)
    train(run)
    run.close()
    assert run.objective.mixed == run.objective.weighed == [0.0, 0.25, 0.5, 0.75]
    again = Run(build(merged(values, **changes | {"max_steps": 8})), str(run.folder / "checkpoint-2"))
    train(again)
    again.close()
    assert again.objective.mixed == [k / 8 for k in range(2, 8)]


def test_a_replay_has_the_progress_of_its_steps(values, tmp_path):
    kept = merged(values, objective=RMT, max_steps=4, save_rollouts=True)
    Pretrainer(build(kept)).train()
    replayed = merged(
        kept,
        replay=str(tmp_path / "run" / "rollouts"),
        output_dir=str(tmp_path / "again"),
        save_rollouts=False,
        objective__name="tests.test_progress:Noting",
    )
    run = Run(build(replayed), None)
    train(run)
    run.close()
    assert run.objective.selected == [0.0, 0.25, 0.5, 0.75]


def test_another_batchs_view_shares_everything_else(values):
    run = Run(build(merged(values, objective=RMT)), None)
    run.close()
    later = run.objective.at(0.5)
    later.seen = 3
    assert run.objective.seen == 3 and later.templates is run.objective.templates and type(later) is rmt.RMT
    assert (
        (run.objective.progress, later.progress) == (0.0, 0.5)
        and later.budget == 4
        and run.objective.budget == 9
    )


# the next-token loss leaves out what was thought about, in whatever units a document and its groups are


def left_out(run: Run, batch: Any) -> Counter[tuple[str, int]]:
    """How often each token of the step's documents is left out."""
    micros = run.pack(batch, run.count(batch))
    found: Counter[tuple[str, int]] = Counter()
    told: Counter[tuple[str, int]] = Counter()
    for micro in micros:
        weights = run.objective.ntp_weights(micro, run.policy.score(micro)).tolist()
        places = [(d.id, i) for d in micro.documents for i in range(1, len(d.token_ids))]
        told.update(places)
        found.update(p for p, w in zip(places, weights, strict=True) if w == 0)
    assert told == Counter((d.id, i) for d in batch.documents for i in range(1, len(d.token_ids)))
    return found


@pytest.mark.parametrize("packing", ["tree", "padded"])
@pytest.mark.parametrize("budget", [50, 300, 16384])
def test_rmt_trains_documents_in_several_units(values, packing, budget):
    """Two positions a document crashed on padded rows, and so did any group in parts."""
    objective = RMT | {"positions_per_document": 2, "template": "{context}", "positions": "random"}
    run = Run(
        build(
            merged(
                values,
                objective=objective,
                packing=packing,
                token_budget=budget,
                positions_per_step=6,
                max_steps=2,
            )
        ),
        None,
    )
    batch = run.next_batch()
    assert len({g.position.document_id for g in batch.groups}) == 3
    assert left_out(run, batch) == Counter((g.position.document_id, g.position.index) for g in batch.groups)
    train(run)
    run.close()
    assert run.skipped == 0


def test_a_page_about_a_model_says_how_far_it_is(corpus, tmp_path):
    parts: list[tuple[int, int]] = []
    inspect(
        str(corpus / "base"),
        str(corpus / "held_out.jsonl"),
        tmp_path / "page.html",
        documents=3,
        max_thought_tokens=4,
        progress=lambda done, total: parts.append((done, total)),
    )
    assert parts == [(done, PARTS) for done in range(1, PARTS + 1)]
