"""Given thoughts: texts from the data that are trained beside the sampled ones."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch

from rlpretrain.config import LossConfig
from rlpretrain.scoring.groups import micro_batches
from rlpretrain.scoring.layout import Layout
from rlpretrain.scoring.scorer import Scorer, score
from rlpretrain.tracking.step_metrics import StepMetrics, staleness
from rlpretrain.training.losses import clipped_surrogate
from rlpretrain.types import Batch
from rollout.store import Store
from rollout.stored_rows import group_from_row, group_to_row
from rollout.types import FinishReason, Group, Thought
from tests.builders.batches import random_batch
from tests.builders.tiny import tiny_model


def with_given(batch: Batch, behaviour: float) -> Batch:
    """The batch, with a given thought in the first place of each group."""
    groups = []
    for group in batch.groups:
        given = Thought((7, 8, 9), (behaviour,) * 3, FinishReason.LENGTH, -5, 0, given=True)
        groups.append(replace(group, thoughts=(given, *group.thoughts[1:])))
    return replace(batch, groups=tuple(groups))


def surrogate_of(batch: Batch, cut: str = "mask") -> tuple[float, dict[str, float]]:
    (micro,) = micro_batches(batch, Layout(10**6, cut=cut))
    scores = score(Scorer(tiny_model()), micro)
    advantage = torch.arange(micro.counted.numel()).view(micro.counted.shape) + 1.0
    loss, info = clipped_surrogate(scores, micro, advantage, LossConfig())
    return float(loss.detach()), info


@pytest.mark.parametrize("garbage", [-30.0, 3.0, math.nan, -math.inf])
def test_behaviour_log_probs_of_given_thoughts_have_no_effect(garbage):
    batch = random_batch(random.Random(1))
    plain, info = surrogate_of(with_given(batch, -1.0))
    other, info_of_garbage = surrogate_of(with_given(batch, garbage))
    assert plain == other and math.isfinite(plain) and info.keys() == info_of_garbage.keys()
    assert info == pytest.approx(info_of_garbage)
    sampled = sum(
        len(t.token_ids) for g in batch.groups for t in g.thoughts[1:] if t.finish_reason == "close"
    )
    assert info["sampling/tokens"] == sampled  # none of the given ones


@pytest.mark.parametrize("cut", ["mask", "force_close", "penalise"])
def test_given_thoughts_are_never_cut_off(cut):
    batch = with_given(random_batch(random.Random(2)), -1.0)
    (micro,) = micro_batches(batch, Layout(10**6, cut=cut, cut_penalty=1.0))
    assert bool(micro.counted[:, 0].all()) and not micro.penalty[:, 0].any()
    assert bool(micro.given[:, 0].all()) and not micro.given[:, 1:].any()


def test_statistics_of_samples_leave_given_thoughts_out():
    batch = random_batch(random.Random(3))
    metrics, alone = StepMetrics(), StepMetrics()
    for group in with_given(batch, -1.0).groups:
        metrics.observe_dropped(group, [True] * 3, [])
        alone.observe_dropped(replace(group, thoughts=group.thoughts[1:]), [True] * 2, [])
    for name in ("completions/mean_length", "thought/closed_frac", "thought/leakage", "thought/repetition"):
        assert metrics.sums[name] == alone.sums[name], name
    assert staleness(with_given(batch, -1.0).groups, 0)["sample/staleness_max"] == 0


def test_a_store_keeps_which_thoughts_were_given(tmp_path):
    batch = with_given(random_batch(random.Random(4)), -1.0)
    store = Store(tmp_path)
    store.write(1, batch.groups, batch.documents, {})
    assert tuple(store.read(1)[0]) == batch.groups
    row = group_to_row(batch.groups[0])
    row["thoughts"] = [{k: v for k, v in dict(t).items() if k != "given"} for t in row["thoughts"]]
    old: Group = group_from_row(row)  # of a file that was written before
    assert not any(thought.given for thought in old.thoughts)
