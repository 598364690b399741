"""Quiet-STaR without its head: its reduction to RLP, its clamp, and thoughts of one length."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from rlpretrain.config import ConfigError
from rlpretrain.config.io import build
from rlpretrain.objectives.quiet_star import Config, QuietSTaR
from rlpretrain.training.run import Run
from rollout.types import FinishReason
from tests.builders.runs import merged, one_step, same, trained, weights
from tests.builders.tiny import word_tokenizer

STEPS = {"positions_per_document": 2, "min_context": 3}
TOKENIZER = word_tokenizer(["<think>", "</think>"])


def quiet_star(values: dict[str, Any], **own: Any) -> dict[str, Any]:
    loss = {"ntp_coef": 1.0, "reader_coef": 1.0}
    return merged(values, objective={"name": "quiet_star", **STEPS, **own}, loss=loss)


@pytest.mark.parametrize("packing", ["tree", "padded"])
def test_without_clamp_it_is_rlp_at_horizon_4_with_the_reader_term(values, tmp_path, packing):
    """Bit by bit, over a whole run with the same sampler."""
    own = {"clamp": False, "advantage": "leave_one_out", "fixed_length": False}
    ours = trained(quiet_star(values, **own), output_dir=str(tmp_path / "quiet_star"), packing=packing)
    section = {"name": "rlp", "positions": "every_k", "every": 1, "target_length": 4, **STEPS}
    rlp = merged(values, objective=section, loss={"ntp_coef": 1.0, "reader_coef": 1.0})
    assert same(ours, trained(rlp, output_dir=str(tmp_path / "rlp"), packing=packing))


def advantages(rewards: list[list[float]], **own: Any) -> torch.Tensor:
    return QuietSTaR(Config(**own), TOKENIZER).advantage(torch.tensor(rewards, dtype=torch.float64), ())


REWARD = st.floats(-50, 50) | st.just(float("nan"))


@given(st.lists(REWARD, min_size=2, max_size=6))
def test_the_clamp_leaves_what_is_above_the_mean(rewards):
    """Against plain Python; NaN counts nowhere."""
    known = [r for r in rewards if r == r]
    mean = sum(known) / len(known) if known else 0.0
    wanted = [r - mean if r == r else 0.0 for r in rewards]
    (free,) = advantages([rewards], clamp=False).tolist()
    (clamped,) = advantages([rewards]).tolist()
    assert free == pytest.approx(wanted, abs=1e-9)
    assert clamped == [max(0.0, a) for a in free] and sum(clamped) >= 0
    assert abs(sum(free)) < 1e-9
    assert not advantages([[known[0]] * 3 if known else [1.0] * 3]).any()


def test_the_mean_of_two_is_half_the_difference():
    assert advantages([[1.0, 4.0]]).tolist() == [[0.0, 1.5]]
    assert advantages([[1.0, 4.0]], advantage="leave_one_out").tolist() == [[0.0, 3.0]]
    assert not advantages([[float("nan"), 4.0]]).any()


@pytest.mark.parametrize("packing", ["tree", "padded"])
def test_thoughts_of_one_length_and_their_gain(values, packing):
    """A sampled close tag ends nothing, one is inserted before the target. The gains are transformers'."""
    config = merged(quiet_star(values), packing=packing, sampling__max_thought_tokens=20)
    run = Run(build(config), None)
    batch = run.next_batch()
    (micro,) = run.pack(batch, run.count(batch))
    scores = run.add_references(run.policy.score(micro), micro)
    got = run.objective.reward(micro.groups, scores.detached())
    close = run.objective.template.close_id
    run.close()
    assert bool(micro.counted.all()) and not micro.penalty.any()
    thoughts = [thought for group in batch.groups for thought in group.thoughts]
    assert any(close in thought.token_ids[:-1] for thought in thoughts)
    full = [thought for thought in thoughts if thought.finish_reason is FinishReason.LENGTH]
    assert len(full) > len(thoughts) / 4 and {len(thought.token_ids) for thought in full} == {20}
    assert all(t.finish_reason is FinishReason.EOS for t in thoughts if t not in full)
    model = AutoModelForCausalLM.from_pretrained(values["model"])

    @torch.no_grad()
    def logp(before: tuple[int, ...], ids: tuple[int, ...]) -> float:
        logits = model(torch.tensor([(*before, *ids)])).logits[0, len(before) - 1 : -1]
        return float(logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None]).sum())

    for b, group in enumerate(micro.groups):
        context, target = group.position.context_ids, group.position.target_ids
        assert len(target) == 4
        for g, thought in enumerate(group.thoughts):
            after = logp((*group.prompt.token_ids, *thought.token_ids, close), target)
            assert float(got[b, g]) == pytest.approx(after - logp(context, target), abs=1e-4)


def test_tree_and_padded_rows_train_alike(values, tmp_path):
    gradients = []
    for packing, budget in (("tree", 16384), ("padded", 16384), ("tree", 60)):
        config = merged(quiet_star(values), packing=packing, token_budget=budget)
        gradients.append(one_step(config, output_dir=str(tmp_path / f"{packing}{budget}"))[1])
    assert all(same(gradients[0], gradient, within=1e-5) for gradient in gradients[1:])


@pytest.mark.parametrize("cut", ["force_close", "penalise"])
def test_a_resumed_run_ends_with_the_same_weights(values, tmp_path, cut):
    config = merged(quiet_star(values), max_steps=4, checkpoint={"every": 2, "keep": 3}, sampling__cut=cut)
    whole = trained(config, output_dir=str(tmp_path / "whole"))
    trained(config, resume=str(tmp_path / "whole" / "checkpoint-2"), output_dir=str(tmp_path / "whole"))
    assert same(whole, weights(tmp_path / "whole" / "model"))


def test_bad_settings_are_refused(values):
    for changes, said in (
        ({"sampling__cut": "mask"}, "sampling.cut mask does not fit objective.fixed_length"),
        ({"objective__advantage": "mean"}, "objective.advantage"),
        ({"objective__clamp": 2.5}, "objective.clamp"),
    ):
        with pytest.raises(ConfigError, match=said):
            Run(build(merged(quiet_star(values), **changes)), None)
