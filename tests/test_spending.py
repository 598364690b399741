"""Every token that a model reads is counted, and groups that are left out are seen in the metrics (issue
15.13).
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from rlpretrain.config.io import build
from rlpretrain.models.spending import Reads, Size, read_by, size_of
from rlpretrain.ranks import Ranks
from rlpretrain.scoring.packing import Layout, stored_rewards
from rlpretrain.tracking.step_metrics import StepMetrics
from rlpretrain.training.loop import train
from rlpretrain.training.run import Run
from rlpretrain.tree import grow
from rollout.types import FinishReason, Group, Position, Prompt, Thought
from tests.builders.runs import merged

RPT = {
    "name": "rpt",
    "template": "raw",
    "positions": "after",
    "marker": "shows",
    "target_length": 2,
    "opening": "it",
    "closing": "shows",
    "max_prediction_tokens": 4,
}


def counted_run(values, **changes):
    """A run of one step, the tokens that its engine read and wrote (each call of it), and those of every
    scoring forward.
    """
    run = Run(build(merged(values, max_steps=1, packing="padded", **changes)), None)
    sampled, scored = [], []
    sample = run.engine.sample

    async def watched(prompts, params, n, seeds):
        found = await sample(prompts, params, n, seeds)
        sampled.append(
            sum(len(p.token_ids) for p in prompts) + sum(len(t.token_ids) for group in found for t in group)
        )
        return found

    run.engine.sample = watched
    run.policy.scorer.register_forward_pre_hook(
        lambda module, args: scored.append((int(args[1].sum()), torch.is_grad_enabled()))
    )
    train(run)
    run.close()
    return run, sampled, scored


def test_what_is_said_after_a_thought_is_read_behind_all_that_stands_before_it(values):
    """rpt samples twice: the second time each prompt and thought is read again."""
    run, sampled, scored = counted_run(values, objective=RPT, sampling__thoughts=8)
    assert len(sampled) == 2 and sampled[1] > 0  # thoughts, then predictions
    assert run.last["num_tokens"] == sum(sampled) + sum(n for n, _ in scored)


@pytest.mark.parametrize(
    ("changes", "forwards"),
    [
        ({}, {True: 1, False: 0}),
        ({"loss__inner_epochs": 2}, {True: 2, False: 1}),
        ({"objective": {"name": "rlp", "positions": "entropy"}}, {True: 1, False: 1}),
    ],
)
def test_every_epoch_the_first_scoring_pass_and_entropies_are_counted(values, changes, forwards):
    run, sampled, scored = counted_run(values, token_budget=100_000, **changes)
    assert {kind: sum(trained is kind for _, trained in scored) for kind in (True, False)} == forwards
    trained, read = (sum(n for n, kind in scored if kind is wanted) for wanted in (True, False))
    assert run.last["num_tokens"] == sum(sampled) + trained + read
    linear = size_of(run.policy.model).matrices * (6 * trained + 2 * (read + sum(sampled)))
    assert linear < run.last["num_flops"] < 1.5 * linear


def test_forwards_of_a_frozen_model_are_counted(values):
    plain, *_ = counted_run(values, baseline__name="self", baseline__frozen_every=0)
    frozen, *_ = counted_run(
        values, baseline__name="frozen", baseline__frozen_every=0, output_dir=values["output_dir"] + "-frozen"
    )
    assert (
        frozen.last["num_tokens"] > plain.last["num_tokens"]
        and frozen.last["num_flops"] > plain.last["num_flops"]
    )


def test_operations_are_those_of_the_formula():
    """2 N forward and 4 N backward a token, and a row of the head; attention compares, and sums values, once
    forward and twice backward.
    """
    size = Size(1000, 1000, 200, 200, 32)
    assert size.operations(Reads(10, 55, 7)) == 2 * 1000 * 10 + 2 * 200 * 7 + 4 * 32 * 55
    trained = Reads(trained_tokens=10, trained_pairs=55, trained_rows=7)
    assert size.operations(trained) == 6 * 1000 * 10 + 6 * 200 * 7 + 12 * 32 * 55
    adapters = Size(1000, 10, 200, 0, 32)  # no gradients of the base
    assert adapters.operations(Reads(trained_tokens=10)) == 10 * (4 * 1000 + 2 * 10)
    assert adapters.operations(Reads(trained_rows=7)) == 7 * 4 * 200
    behind, whole = Reads(), Reads()
    whole.add(12)
    behind.add(7)
    behind.add(5, behind=7)
    assert behind == whole == Reads(12, 78, 12)


def test_a_tree_reads_shared_tokens_once_and_each_token_meets_its_own_path():
    rows = [(1, 2, 3, 4), (1, 2, 5), (1, 2, 3, 6, 7)]
    ids, tree, _ = grow(rows, least=1)
    tokens, pairs = read_by(
        torch.from_numpy(ids)[None], torch.ones(1, 1), torch.from_numpy(tree.positions)[None], tree
    )
    prefixes = {row[: k + 1] for row in rows for k in range(len(row))}
    assert (tokens, pairs) == (len(prefixes), sum(map(len, prefixes)))
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    assert read_by(mask, mask, None, None) == (4.0, 7.0)


def group(name: str, rewards, reasons=(FinishReason.CLOSE,) * 2) -> Group:
    thoughts = tuple(Thought((5, 6), (0.0, 0.0), reason, 0, 0) for reason in reasons)
    return Group(
        name, Position("d", 1, (1,), (2,)), Prompt((1,), (), close_ids=(4,)), thoughts, 0, rewards=rewards
    )


def test_groups_that_are_left_out_count_in_rewards(values):
    """rpt leaves out what is all right or all wrong: the mean reward, and the share of such groups, were
    of the rest alone.
    """
    run = Run(build(merged(values, max_steps=1, objective=RPT)), None)
    take, seen = run.source.take, []

    def watched(*args):
        batch = take(*args)
        seen.extend(batch.groups)
        return batch

    run.source.take = watched
    train(run)
    run.close()
    row = json.loads((Path(values["output_dir"]) / "metrics.jsonl").read_text().splitlines()[0])
    rewards = [
        r for g in seen for r, t in zip(g.rewards, g.thoughts, strict=True) if run.layout.cut != "mask"
    ]
    assert row["reward"] == pytest.approx(sum(rewards) / len(rewards))
    equal = [len(set(g.rewards)) == 1 for g in seen]
    assert row["frac_reward_zero_std"] == row["batch/dropped_frac"] == pytest.approx(
        sum(equal) / len(equal)
    ) and any(equal)
    lengths = [len(t.token_ids) for g in seen for t in g.thoughts]
    assert row["completions/mean_length"] == pytest.approx(sum(lengths) / len(lengths))


def test_a_left_out_group_counts_as_a_trained_one_would():
    cut = (FinishReason.CLOSE, FinishReason.LENGTH)
    assert stored_rewards(group("g", (1.0, 1.0), cut), Layout(100, "penalise", 0.25)) == [1.0, 0.75]
    masked = stored_rewards(group("g", (1.0, 1.0), cut), Layout(100, "mask"))
    assert masked[0] == 1.0 and math.isnan(masked[1])
    metrics = StepMetrics()
    metrics.observe_dropped(group("a", (1.0, 1.0), cut), [True, False], masked)
    metrics.observe_dropped(group("b", (0.1, 0.1)), [True, True], [0.1, 0.1])
    found = metrics.means(Ranks())
    assert found["reward"] == pytest.approx(1.2 / 3) and found["frac_reward_zero_std"] == 1.0
    assert found["thought/uncounted_frac"] == 0.25 and found["thought/closed_frac"] == 0.75
