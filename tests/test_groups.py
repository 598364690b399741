"""scoring/groups.py: what comes out by group does not depend on how the groups were packed."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from rlpretrain.scoring.groups import micro_batches, rows_by_group, score_batch, token_entropies, whole_groups
from rlpretrain.scoring.packing import Layout
from rlpretrain.scoring.scorer import Scorer, score, score_function
from rlpretrain.types import Batch
from tests.builders.batches import VOCABULARY, random_batch
from tests.builders.tiny import tiny_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def scorer():
    return Scorer(tiny_model("llama", VOCABULARY, seed=1))


@pytest.fixture(scope="module")
def batch():
    return random_batch(random.Random(3), 3, 2, 5, 2)


def scores_at(batch, scorer, budget, **more):
    micros = micro_batches(batch, Layout(budget, cut="force_close"))
    return micros, score_batch(score_function(scorer, hits=True), micros, CPU, **more)


@pytest.mark.parametrize("budget", [1, 60, 300])
def test_a_split_group_has_the_scores_of_a_whole_one(batch, scorer, budget):
    _, whole = scores_at(batch, scorer, 10**6)
    micros, parts = scores_at(batch, scorer, budget)
    assert (budget != 1) or any(offset for micro in micros for offset in micro.offsets)
    assert parts.groups.keys() == whole.groups.keys() == {g.id for g in batch.groups}
    for id_, one in whole.groups.items():
        other = parts.groups[id_]
        assert other.group == one.group
        for name in (
            "thought_logps",
            "target_logps",
            "baseline_logps",
            "joint_target",
            "joint_baseline",
            "joint_own",
        ):
            torch.testing.assert_close(getattr(other, name), getattr(one, name), rtol=0, atol=1e-5)
        assert torch.equal(other.target_hits, one.target_hits) and torch.equal(other.own_hits, one.own_hits)
        torch.testing.assert_close(one.target_logps.sum(-1).double(), one.joint_target, rtol=0, atol=1e-5)
        assert one.rewards.isnan().all(), "no objective was given"


def test_documents_have_the_models_own_log_probs(batch, scorer):
    _, found = scores_at(batch, scorer, 60)
    for document in batch.documents:
        ids = torch.tensor([document.token_ids])
        own = scorer.model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
        torch.testing.assert_close(found.documents[document.id].logps, own.detach(), rtol=0, atol=1e-5)


def test_rewards_and_the_reference_reach_every_group(batch, scorer):
    class Halved:
        def __call__(self, scores, micro):
            return replace(scores, baseline_logps=scores.baseline_logps / 2)

    def reward(groups, scores):
        return (scores.target_logps - scores.baseline_logps[:, None]).sum(-1)

    objective = SimpleNamespace(reward=reward)
    _, found = scores_at(batch, scorer, 60, reference=Halved(), objective=objective)
    for scores in found.groups.values():
        torch.testing.assert_close(scores.joint_baseline, scores.joint_own / 2)
        torch.testing.assert_close(
            scores.rewards, scores.joint_target - scores.joint_baseline, rtol=0, atol=1e-5
        )


def test_rows_join_in_the_order_of_the_thoughts(batch):
    micros = micro_batches(batch, Layout(1, cut="force_close"))
    thoughts = {id(t): float(k) for g in batch.groups for k, t in enumerate(g.thoughts)}
    values = []
    for micro in micros:
        longest = max(len(g.thoughts) for g in micro.groups) if micro.groups else 0
        table = torch.full((len(micro.groups), longest), math.nan)
        for b, group in enumerate(micro.groups):
            table[b, : len(group.thoughts)] = torch.tensor([thoughts[id(t)] for t in group.thoughts])
        values.append(table)
    joined = rows_by_group(micros, values)
    assert {id_: rows.tolist() for id_, rows in joined.items()} == {
        g.id: [0.0, 1.0, 2.0, 3.0, 4.0] for g in batch.groups
    }
    assert whole_groups(micros) == {g.id: g for g in batch.groups}


def test_entropies_are_those_of_the_whole_distribution(batch, scorer):
    found = token_entropies(score_function(scorer, entropies=True), batch.documents, 60, CPU)
    for document, entropies in zip(batch.documents, found, strict=True):
        logps = scorer.model(input_ids=torch.tensor([document.token_ids])).logits[0, :-1].log_softmax(-1)
        expected = -(logps.exp() * logps).sum(-1)
        assert entropies[0] == 0
        torch.testing.assert_close(entropies[1:], expected.detach(), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="gives entropies"):
        token_entropies(score_function(scorer), batch.documents, 60, CPU)


def test_entropies_and_hits_at_once_are_refused(batch, scorer):
    (micro,) = micro_batches(Batch(batch.groups[:1], batch.documents[:1]), Layout(10**6, cut="force_close"))
    with pytest.raises(ValueError, match="not both at once"):
        score(scorer, micro, entropies=True, hits=True)
