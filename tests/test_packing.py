"""One gradient, however a step is cut: one pass or two, any budget, any number of micro-batches, one rank
or two.
"""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlpretrain.evaluation.evaluate import score_targets
from rlpretrain.objectives import rlp
from rlpretrain.ranks import Ranks
from rlpretrain.scoring.balance import balance, plan_moves
from rlpretrain.scoring.packing import Layout, cost, count, families, pack
from rlpretrain.scoring.scorer import Scorer
from rlpretrain.training.advantages import compute_advantages, compute_step_advantages
from rlpretrain.types import Batch
from tests.builders.batches import VOCABULARY, random_batch
from tests.builders.runs import launch, merged, one_step
from tests.builders.tiny import tiny_model

LOSS = {
    "loss": {"ntp_coef": 0.3, "reader_coef": 0.2},
    "positions_per_step": 8,
    "objective__positions_per_document": 2,
    "sampling__thoughts": 5,
}


class ScoredFirst(rlp.RLP):
    """RLP that has its rewards before it trains."""

    needs = rlp.RLP.needs | {"batch"}


def close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """The same gradient: 1e-5 of the largest entry of each parameter's."""
    assert ours.keys() == theirs.keys()
    for name, grad in theirs.items():
        assert float((ours[name] - grad).abs().max()) <= 1e-5 * float(grad.abs().max()) + 1e-9, name


@pytest.mark.parametrize("packing", ["tree", "padded"])
def test_passes_budgets_and_splits_give_one_gradient(values, tmp_path, packing):
    run, whole = one_step(values, packing=packing, **LOSS)
    assert run.last["batch/micro_batches"] == 1 and not run.has_split_groups
    assert max(float(g.abs().max()) for g in whole.values()) > 1e-3
    first = LOSS | {"objective__name": "tests.test_packing:ScoredFirst"}
    seen = []
    for budget, changes in ((16384, first), (150, LOSS), (60, LOSS), (1, LOSS), (60, first)):
        folder = str(tmp_path / f"{budget} {len(seen)}")
        run, parts = one_step(values, packing=packing, token_budget=budget, output_dir=folder, **changes)
        close(parts, whole)
        seen.append((run.last["batch/micro_batches"], run.has_split_groups))
    assert (
        seen[0] == (1, False)
        and 1 < seen[1][0] < seen[2][0] < seen[3][0]
        and seen[2][1]
        and seen[3] == (40, True)
    )


@pytest.mark.parametrize("tree", [False, True])
@pytest.mark.parametrize("budget", [1, 60])
def test_a_group_in_parts_is_judged_as_a_whole(tree, budget):
    batch = random_batch(random.Random(3), 2, 2, 5, 2)
    rewarded = [
        replace(g, rewards=tuple(float(10 * i + k) for k in range(5))) for i, g in enumerate(batch.groups)
    ]
    batch = Batch(rewarded, batch.documents)
    layout = Layout(budget, cut="force_close", tree=tree)
    totals = count(batch, "force_close")
    micros = list(pack(batch, layout, totals))
    assert any(k for m in micros for k in m.offsets)
    assert all(m.input_ids.numel() <= budget or all(len(g.thoughts) == 1 for g in m.groups) for m in micros)

    class Policy:
        model = tiny_model("llama", VOCABULARY, seed=1)

        def score(self, micro):
            from rlpretrain.scoring.scorer import score

            return score(Scorer(self.model), replace(micro, tree=None) if not tree else micro)

    class Stored(rlp.RLP):
        reward = rlp.base.Objective.reward

        def advantage(self, reward, groups):
            assert [g.thoughts for g in groups] == [
                next(b.thoughts for b in batch.groups if b.id == g.id) for g in groups
            ]
            return super().advantage(reward, groups)

    class run:  # noqa: N801
        policy, objective = Policy(), Stored.__new__(Stored)
        add_references = staticmethod(lambda scores, micro: scores)

    if tree:
        from rlpretrain.scoring import attention

        attention.install(run.policy.model)
    found: dict[tuple[str, int], tuple[float, float]] = {}
    for micro, known in zip(micros, compute_step_advantages(run, micros), strict=True):
        for b, group in enumerate(micro.groups):
            for g in range(len(group.thoughts)):
                found[group.id, micro.offsets[b] + g] = (
                    float(known.rewards[b, g]),
                    float(known.advantages[b, g]),
                )
    (one,) = pack(batch, replace(layout, token_budget=10**6), totals)
    whole = compute_advantages(run.objective, one, run.policy.score(one))
    assert len(found) == sum(len(g.thoughts) for g in batch.groups)
    for b, group in enumerate(one.groups):
        for g in range(len(group.thoughts)):
            expected = float(whole.rewards[b, g]), float(whole.advantages[b, g])
            assert found[group.id, g] == pytest.approx(expected, abs=1e-6)


def test_evaluation_does_not_depend_on_the_budget():
    batch = random_batch(random.Random(1), 3, 1, 4, 2)
    scorer = Scorer(tiny_model("llama", VOCABULARY, seed=1))
    whole = score_targets(scorer, batch.groups, batch.documents, Layout(10**6, cut="force_close"))
    parts = score_targets(scorer, batch.groups, batch.documents, Layout(1, cut="force_close"))
    for name in ("logps", "hits", "own_logps", "own_hits"):
        assert getattr(whole, name) == pytest.approx(getattr(parts, name), abs=1e-5)
    assert abs(whole.logps).min() > 0


# ranks


@settings(max_examples=300, deadline=None)
@given(costs=st.lists(st.lists(st.integers(0, 1000), max_size=12), min_size=1, max_size=6))
def test_what_is_handed_over_evens_the_ranks_out(costs):
    moves = plan_moves(costs)
    loads = [sum(own) for own in costs]
    after = list(loads)
    for (rank, i), to in moves.items():
        assert rank != to
        after[rank] -= costs[rank][i]
        after[to] += costs[rank][i]
    assert sum(after) == sum(loads) and max(after) <= max(loads)
    if max(after) > 1.05 * sum(after) / len(after):  # what is left cannot be moved to anybody's good
        top = after.index(max(after))
        left = [c for i, c in enumerate(costs[top]) if (top, i) not in moves]
        left += [costs[rank][i] for (rank, i), to in moves.items() if to == top]
        assert not any(0 < c < max(after) - min(after) for c in left)


def test_documents_keep_their_groups_when_they_move():
    batch = random_batch(random.Random(7), 6, 2, 3, 2)
    by_document = families(batch)
    shares = [by_document[:5], by_document[5:]]  # one rank has five documents, the other one
    layout = Layout(10**6, tree=True)

    class Two(Ranks):
        def gather(self, value):
            if value and isinstance(value[0], int):
                return costs
            return [[(to, shares[r][i]) for (rank, i), to in moves.items() if rank == r] for r in (0, 1)]

    costs = [[cost(u, layout) for u in share] for share in shares]
    moves = plan_moves(costs)
    assert moves and all(rank == 0 for rank, _ in moves)
    seen = []
    for rank, share in enumerate(shares):
        mine = Batch([g for groups, _ in share for g in groups], [d for _, d in share])
        got = balance(mine, layout, Two(rank, 2))
        assert {g.position.document_id for g in got.groups} == {d.id for d in got.documents}
        seen += [d.id for d in got.documents]
    assert sorted(seen) == sorted(d.id for d in batch.documents)


@pytest.mark.slow
def test_two_ranks_have_one_gradient_and_share_the_work(values, tmp_path):
    texts = [json.loads(line)["text"] for line in Path(values["data"]["path"]).read_text().splitlines()[:60]]
    uneven = [
        " ".join(texts[3 * i : 3 * i + 3]) if i % 2 else texts[3 * i] for i in range(20)
    ]  # a rank draws each second one
    (tmp_path / "uneven.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in uneven))
    data = {"path": str(tmp_path / "uneven.jsonl"), "max_length": 128, "shuffle": False}
    changes = LOSS | {
        "policy": {"backend": "torch"},
        "token_budget": 150,
        "data": data,
        "objective__positions_per_document": 1,
    }
    run, whole = one_step(values, output_dir=str(tmp_path / "one"), **changes)
    launch(
        [
            {
                "config": merged(
                    values,
                    max_steps=1,
                    output_dir=str(tmp_path / "two"),
                    optim__clip_grad_norm=0.0,
                    **changes,
                ),
                "gradient": str(tmp_path / "gradient"),
            }
        ],
        tmp_path,
    )
    shares = [torch.load(tmp_path / f"gradient-{rank}.pt") for rank in (0, 1)]
    summed = {n: shares[0]["gradient"][n] + shares[1]["gradient"][n] for n in whole}
    close(summed, whole)
    drawn, kept = ([share[what] for share in shares] for what in ("drawn", "kept"))
    assert sorted(sum(drawn, [])) == sorted(sum(kept, [])) and sorted(drawn[0]) != sorted(kept[0])
    before, after = ([share[what] for share in shares] for what in ("drawn_cost", "kept_cost"))
    assert sum(before) == sum(after) and max(after) < max(before)
