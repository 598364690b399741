"""NOVER: ranks, efficiency and format, worked thought by thought, and its proxy."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlpretrain.config import ConfigError
from rlpretrain.config.io import build
from rlpretrain.objectives.nover import efficiency, rank_rewards
from rlpretrain.training.loop import train
from rlpretrain.training.run import Run
from tests.builders.runs import merged, one_step, same, trained, weights

HERE = {"positions": "after", "marker": "shows", "target_length": 2}


def nover(values: dict[str, Any], baseline: str = "ema", **own: Any) -> dict[str, Any]:
    settings = {"name": baseline, "decay": 0.5, "frozen_every": 0}
    return merged(values, objective={"name": "nover", **HERE, **own}, baseline=settings)


THOUGHTS = st.lists(st.tuples(st.integers(-9, 9), st.integers(0, 5), st.booleans()), min_size=1, max_size=7)


def columns(thoughts: list[tuple[int, int, bool]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Perplexities, lengths and whether they are valid, [1, G]."""
    perplexity, lengths, valid = (torch.tensor([column]) for column in zip(*thoughts, strict=True))
    return perplexity.double(), lengths.double(), valid


@given(THOUGHTS)
def test_ranks_and_efficiency_thought_by_thought(thoughts):
    perplexity, lengths, valid = columns(thoughts)
    known = [t for t in thoughts if t[2]]
    ranks, shares = [], []
    for p, length, counts in thoughts:
        better = sum(other[0] < p for other in known)
        beaten = sum(other[0] > p and other[1] > length for other in known)
        ranks.append((len(known) - better) / len(known) if counts else 0.0)
        shares.append(beaten / max(len(known) - 1, 1) if counts else 0.0)
    assert rank_rewards(perplexity, valid)[0].tolist() == pytest.approx(ranks, abs=1e-12)
    assert efficiency(perplexity, lengths, valid)[0].tolist() == pytest.approx(shares, abs=1e-12)


@given(THOUGHTS, st.randoms(use_true_random=False))
def test_what_changes_no_rank(thoughts, random):
    """Any increasing map of the perplexity; a permutation of the group permutes the rewards; ties share."""
    perplexity, lengths, valid = columns(thoughts)
    ranks, shares = rank_rewards(perplexity, valid), efficiency(perplexity, lengths, valid)
    for increasing in (lambda p: p**3, lambda p: (p / 4).exp(), lambda p: 3 * p - 7):
        assert torch.equal(rank_rewards(increasing(perplexity), valid), ranks)
        assert torch.equal(efficiency(increasing(perplexity), lengths, valid), shares)
    order = torch.tensor(random.sample(range(len(thoughts)), len(thoughts)))
    permuted = (perplexity[:, order], lengths[:, order], valid[:, order])
    assert torch.equal(rank_rewards(permuted[0], permuted[2]), ranks[:, order])
    assert torch.equal(efficiency(*permuted), shares[:, order])
    for (p, _, one), rank in zip(thoughts, ranks[0].tolist(), strict=True):
        assert all(
            r == rank
            for (q, _, two), r in zip(thoughts, ranks[0].tolist(), strict=True)
            if p == q and one and two
        )


def test_differences_up_to_tie_are_none():
    perplexity, valid = torch.tensor([[1.0, 1.00005, 2.0]]).double(), torch.ones(1, 3, dtype=torch.bool)
    lengths = torch.tensor([[5.0, 6.0, 7.0]])
    assert rank_rewards(perplexity, valid, 1e-4)[0].tolist() == pytest.approx([1, 1, 1 / 3])
    assert rank_rewards(perplexity, valid)[0].tolist() == pytest.approx([1, 2 / 3, 1 / 3])
    assert efficiency(perplexity, lengths, valid, 1e-4)[0].tolist() == [0.5, 0.5, 0.0]


@pytest.mark.parametrize("discounted", [True, False])
def test_the_reward_is_the_formula(values, discounted):
    """With the moved proxy's own log-probs, and thoughts of which some did not close themselves."""
    own = {"length_discount": discounted, "format_weight": 0.5, "reasoning_weight": 2.0}
    config = merged(nover(values, efficiency_weight=3.0, **own), sampling__max_thought_tokens=25)
    run = Run(build(config | {"positions_per_step": 8}), None)
    batch = run.next_batch()
    (micro,) = run.pack(batch, run.count(batch))
    with torch.no_grad():
        for p in run.baseline.model.parameters():
            p.mul_(1.5)  # the proxy is another model now
    scores = run.add_references(run.policy.score(micro), micro).detached()
    assert not torch.allclose(scores.target_baseline, scores.target_logps, atol=1e-2)
    got = run.objective.reward(micro.groups, scores)
    run.close()
    forms = set()
    for b, group in enumerate(micro.groups):
        rows = []
        for g, thought in enumerate(group.thoughts):
            closed = thought.finish_reason == "close"
            length = len(thought.token_ids) - closed
            n = max(1.0, 1 + math.log(length)) if discounted and length else 1.0
            rows.append((-float(scores.target_baseline[b, g].double().mean()) / n, length, closed))
        known = [row for row in rows if row[2]]
        for g, (p, length, closed) in enumerate(rows):
            rank = sum(other < p - 1e-4 for other, _, _ in known)
            beaten = sum(other > p + 1e-4 and longer > length for other, longer, _ in known)
            wanted = 0.0
            if closed:
                share = beaten / max(len(known) - 1, 1)
                wanted = 0.5 + 2.0 * (len(known) - rank) / len(known) + 3.0 * share
            assert float(got[b, g]) == pytest.approx(wanted, abs=1e-9)
            forms.add(closed)
        order = list(reversed(range(len(group.thoughts))))
        turned = replace(group, thoughts=tuple(group.thoughts[g] for g in order))
        one = replace(
            scores,
            target_baseline=scores.target_baseline[b : b + 1, order],
            target_mask=scores.target_mask[b : b + 1],
            counted=scores.counted[b : b + 1, order],
        )
        assert torch.equal(run.objective.reward([turned], one)[0], got[b, order])
    assert forms == {True, False}


def test_a_proxy_without_a_number_gives_no_reward(values):
    run = Run(build(nover(values, "self")), None)
    batch = run.next_batch()
    (micro,) = run.pack(batch, run.count(batch))
    scores = run.add_references(run.policy.score(micro), micro).detached()
    run.close()
    broken = scores.target_baseline.clone()
    broken[0, 1] = math.nan
    reward = run.objective.reward(micro.groups, replace(scores, target_baseline=broken))
    assert reward.isnan().nonzero().tolist() == [[0, 1]]


def test_tree_and_padded_rows_train_alike(values, tmp_path):
    gradients = []
    for packing in ("tree", "padded"):
        config = merged(nover(values), packing=packing, output_dir=str(tmp_path / packing))
        gradients.append(one_step(config)[1])
    assert same(*gradients, within=1e-5) and any(g.any() for g in gradients[0].values())


@pytest.mark.parametrize("baseline", ["ema", "self"])
def test_a_resumed_run_ends_with_the_same_weights(values, tmp_path, baseline):
    config = merged(nover(values, baseline), max_steps=4, checkpoint={"every": 2, "keep": 3})
    whole = trained(config, output_dir=str(tmp_path / "whole"))
    trained(config, resume=str(tmp_path / "whole" / "checkpoint-2"), output_dir=str(tmp_path / "whole"))
    assert same(whole, weights(tmp_path / "whole" / "model"))


def test_bad_settings_are_refused(values):
    for changes, said in (
        (
            {"baseline__name": "none"},
            "baseline.name none does not fit objective NOVER.*self or frozen or ema",
        ),
        ({"objective__format_weight": -1.0}, "objective.format_weight"),
        ({"objective__advantage": "grpo"}, "objective.advantage"),
        ({"reference": values["model"]}, "objective NOVER uses no reference"),
    ):
        with pytest.raises(ConfigError, match=said):
            Run(build(merged(nover(values), **changes)), None)
    run = Run(build(merged(nover(values, "self"), token_budget=40)), None)
    with pytest.raises(ConfigError, match=r"needs all of its thoughts at once: raise token_budget \(40\)"):
        train(run)
    run.close()
