"""The invariants of the loop (design §4), each by name."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from rlpretrain.config.io import build
from rlpretrain.corpora import dial
from rlpretrain.scoring import scorer as scoring
from rlpretrain.scoring.packing import count
from rlpretrain.training.advantages import compute_advantages
from rlpretrain.training.losses import clipped_surrogate, ntp_loss, target_loss
from rlpretrain.training.run import Run
from rlpretrain.types import Batch, MicroBatch, Scores
from rollout.types import FinishReason
from tests.builders.runs import merged, one_step, same, trained
from tests.builders.tiny import tiny_model


def leaf_scores(scores: Scores) -> Scores:
    """The same scores as leaves that gather gradients."""
    names = ("thought_logps", "target_logps", "trunk_logps", "baseline_logps")
    return replace(scores, **{n: getattr(scores, n).detach().clone().requires_grad_() for n in names})


def batch_of(values, **changes):
    run = Run(build(merged(values, **changes)), None)
    batch = run.next_batch()
    totals = run.count(batch)
    return run, batch, totals, run.pack(batch, totals)


def test_1_only_sampled_thought_tokens_are_trained_when_both_coefficients_are_zero(values):
    run, batch, totals, micros = batch_of(values, loss={"ntp_coef": 0.0, "reader_coef": 0.0})
    micro = micros[0]
    scores = leaf_scores(run.policy.score(micro))
    known = compute_advantages(run.objective, micro, scores)
    reward = known.rewards
    advantage = known.advantages
    assert not reward.requires_grad and not advantage.requires_grad
    surrogate, _ = clipped_surrogate(scores, micro, advantage, run.config.loss)
    weights = run.objective.target_weights(micro.groups, scores)
    loss = (
        surrogate
        + target_loss(scores, weights)
        + 0.0 * ntp_loss(scores, run.objective.ntp_weights(micro, scores))
    )
    loss.backward()
    for name in ("target_logps", "trunk_logps"):
        grad = getattr(scores, name).grad
        assert grad is None or torch.count_nonzero(grad) == 0, name
    assert scores.baseline_logps.grad is None
    trained_tokens = scores.thought_logps.grad != 0
    assert torch.equal(trained_tokens & ~micro.thought_mask, torch.zeros_like(trained_tokens))
    assert bool(trained_tokens.any())


def read_by(micro: MicroBatch, state: int) -> list[int]:
    """The tokens that a state of a micro-batch has read, in order."""
    row, column = divmod(state, micro.input_ids.shape[1])
    if micro.tree is None:
        return micro.input_ids[row, : column + 1].tolist()
    seen = np.flatnonzero(micro.tree.dense()[column])
    return micro.input_ids[0, seen[micro.tree.positions[seen].argsort()]].tolist()


def test_1_the_sampled_close_tag_is_trained_and_injected_tags_are_not(values):
    run, batch, totals, micros = batch_of(values)
    open_id, close_id = run.tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    for micro in micros:
        for b, group in enumerate(micro.groups):
            assert group.prompt.token_ids[-1] == open_id
            for g, thought in enumerate(group.thoughts):
                labels = micro.thought_labels[b, g][micro.thought_mask[b, g]].tolist()
                assert labels == list(
                    thought.token_ids
                )  # exactly what was sampled: no open tag, no injected close tag
                target = group.position.target_ids
                injected = [] if thought.finish_reason is FinishReason.CLOSE else [close_id]
                ids = read_by(micro, int(micro.target_rows[b, g, len(target) - 1]))
                assert ids == [*group.prompt.token_ids, *thought.token_ids, *injected, *target[:-1]]


def test_1_a_closed_thought_ends_in_a_trained_close_tag(values):
    run, *_, micros = batch_of(values, sampling__max_thought_tokens=200, sampling__thoughts=8)
    close_id = run.tokenizer.convert_tokens_to_ids("</think>")
    closed = [
        (m, b, g)
        for m in micros
        for b, group in enumerate(m.groups)
        for g, t in enumerate(group.thoughts)
        if t.finish_reason is FinishReason.CLOSE
    ]
    assert closed
    for micro, b, g in closed:
        assert int(micro.thought_labels[b, g][micro.thought_mask[b, g]][-1]) == close_id


def test_1_gradient_of_the_loss_by_finite_differences(values, tmp_path):
    """The whole gradient equals that of -mean(1/|c| sum A log pi) with A constant, by central differences
    in float64.
    """
    tiny_model("gpt2", vocab_size=len(dial.WORDS), seed=3).save_pretrained(
        tmp_path / "gpt2"
    )  # norms follow the dtype
    dial.tokenizer().save_pretrained(tmp_path / "gpt2")
    loss = {"ntp_coef": 0.0, "reader_coef": 0.0}
    run, batch, totals, micros = batch_of(values, model=str(tmp_path / "gpt2"), loss=loss)
    run.policy.model.double()
    micro = replace(micros[0], token_weights=micros[0].token_weights.double())
    scorer = scoring.Scorer(run.policy.model)
    scores = scoring.score(scorer, micro)
    known = compute_advantages(run.objective, micro, scores)
    advantage = known.advantages
    surrogate, _ = clipped_surrogate(scores, micro, advantage.double(), run.config.loss)
    parameter = run.policy.model.get_input_embeddings().weight
    (gradient,) = torch.autograd.grad(surrogate, parameter)
    direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def value(shift: float) -> float:
        with torch.no_grad():
            parameter.add_(direction, alpha=shift)
            logps = scoring.score(scorer, micro).thought_logps
            parameter.sub_(direction, alpha=shift)
        return -float(
            (advantage.double()[..., None] * logps * micro.token_weights * micro.thought_mask).sum()
        )

    slope = (value(1e-6) - value(-1e-6)) / 2e-6
    assert slope == pytest.approx(float((gradient * direction).sum()), rel=1e-5)


@pytest.mark.parametrize("other", ["ema", "frozen", "self"])
def test_2_baselines_cancel_and_give_the_same_weights(values, other, tmp_path):
    plain = {"loss": {"ntp_coef": 0.0, "reader_coef": 0.0}, "max_steps": 4}
    none = trained(values, baseline__name="none", output_dir=str(tmp_path / "none"), **plain)
    assert same(
        none,
        trained(values, baseline__name=other, baseline__decay=0.5, output_dir=str(tmp_path / other), **plain),
    )
    start = trained(values, output_dir=str(tmp_path / "zero"), **(plain | {"optim__lr": 0.0}))
    assert not same(none, start)  # and the runs did learn something


def test_3_equal_rewards_give_exactly_zero_advantage(values):
    run, *_, micros = batch_of(values)
    scores = run.policy.score(micros[0])
    flat = replace(scores, target_logps=torch.full_like(scores.target_logps, -1.2345678))
    known = compute_advantages(run.objective, micros[0], flat)
    advantage = known.advantages
    assert torch.count_nonzero(advantage) == 0


def test_4_micro_batch_splits_give_the_same_gradient(values):
    _, whole = one_step(values, positions_per_step=8, token_budget=100_000)
    run, single = one_step(
        values, positions_per_step=8, token_budget=1, output_dir=values["output_dir"] + "1"
    )
    assert run.last["batch/padding_frac"] < 1
    _, odd = one_step(values, positions_per_step=8, token_budget=300, output_dir=values["output_dir"] + "3")
    for other in (single, odd):
        for name, gradient in whole.items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-4, atol=1e-5)


def test_4_token_mean_is_a_mean_over_all_thought_tokens(values):
    run, batch, totals, micros = batch_of(values, loss__reduction="token_mean", token_budget=200)
    assert sum(float(m.token_weights.sum()) for m in micros) / totals.thoughts == pytest.approx(1.0, rel=1e-5)
    run, batch, totals, micros = batch_of(values, token_budget=200, output_dir=values["output_dir"] + "2")
    for micro in micros:  # thought_mean: each thought weighs 1
        assert torch.allclose(micro.token_weights.sum(-1), micro.counted.float())


def test_4_masked_thoughts_count_nowhere(values):
    run, batch, totals, micros = batch_of(values, sampling__cut="mask", sampling__max_thought_tokens=20)
    closed = sum(t.finish_reason is FinishReason.CLOSE for g in batch.groups for t in g.thoughts)
    assert totals.thoughts == closed < 16
    assert sum(int(m.counted.sum()) for m in micros) == closed
    scores = run.policy.score(micros[0])
    known = compute_advantages(run.objective, micros[0], scores)
    reward = known.rewards
    advantage = known.advantages
    assert torch.equal(reward.isnan(), ~micros[0].counted)
    assert torch.count_nonzero(advantage[~micros[0].counted]) == 0


def test_4_a_document_split_over_micro_batches_counts_its_trunk_once(values):
    run, batch, totals, micros = batch_of(
        values, objective={"name": "rlp", "positions_per_document": 3}, positions_per_step=6, token_budget=1
    )
    assert len(micros) == 6 * 4 and len(batch.documents) == 2  # a thought in each
    assert (
        sum(len(m.trunk_rows) for m in micros)
        == totals.trunk
        == sum(len(d.token_ids) - 1 for d in batch.documents)
    )
    for micro in micros:  # while each has the no-think arm of its own position
        assert bool((micro.baseline_rows[micro.target_mask] >= 0).all())


def test_5_synchronous_runs_are_deterministic(values, tmp_path):
    first = trained(values)
    assert same(first, trained(values, output_dir=str(tmp_path / "again")))
    assert not same(first, trained(values, output_dir=str(tmp_path / "seed"), seed=1))


def test_6_on_policy_the_ratio_is_exactly_one(values):
    run, *_, micros = batch_of(values)
    assert all(m.on_policy for m in micros)
    micro = micros[0]
    scores = run.policy.score(micro)
    advantage = torch.ones_like(micro.token_weights[..., 0])
    loss, info = clipped_surrogate(scores, micro, advantage, run.config.loss)
    assert float(loss.detach()) == -float((micro.token_weights * micro.thought_mask).sum()) and not info
    stale = replace(micro, on_policy=False, behaviour_logps=scores.thought_logps.detach() - 5.0)
    capped, info = clipped_surrogate(scores, stale, advantage, run.config.loss)
    assert float(capped.detach()) == pytest.approx(
        2.0 * float(loss.detach()), rel=1e-6
    )  # truncated at importance_cap
    assert any(k.startswith("sampling/") for k in info)


def test_6_behaviour_and_trainer_agree_at_the_sampling_temperature(values):
    for temperature in (1.0, 0.7):
        run, *_, micros = batch_of(
            values, sampling__temperature=temperature, output_dir=values["output_dir"] + str(temperature)
        )
        for micro in micros:
            scores = run.policy.score(micro)
            difference = (scores.thought_logps - micro.behaviour_logps)[micro.thought_mask].abs().max()
            assert float(difference.detach()) < 1e-4


def test_6_targets_are_scored_at_temperature_one(values):
    run, *_, micros = batch_of(values, sampling__temperature=0.5)
    hot = scoring.score(run.policy.scorer, micros[0], 1.0)
    assert torch.equal(run.policy.score(micros[0]).target_logps, hot.target_logps)
    assert not torch.equal(run.policy.score(micros[0]).thought_logps, hot.thought_logps)


def test_6_inner_epochs_freeze_advantages_and_old_log_probs(values, tmp_path):
    run, *_, micros = batch_of(values, loss__inner_epochs=2)
    from rlpretrain.training.advantages import compute_step_advantages

    first, *_ = compute_step_advantages(run, micros)
    fresh = compute_advantages(run.objective, micros[0], run.policy.score(micros[0]))
    assert torch.equal(first.advantages, fresh.advantages)
    assert first.old_logps is not None and not first.old_logps.requires_grad
    once = trained(values, output_dir=str(tmp_path / "1"), max_steps=1)
    twice = trained(values, output_dir=str(tmp_path / "2"), max_steps=1, loss__inner_epochs=2)
    assert not same(once, twice)


def test_7_cut_policies(values):
    for cut in ("mask", "force_close", "penalise"):
        run, batch, totals, micros = batch_of(
            values,
            sampling__cut=cut,
            sampling__cut_penalty=3.0,
            sampling__max_thought_tokens=2,
            output_dir=values["output_dir"] + cut,
        )
        unclosed = torch.tensor(
            [
                [t.finish_reason is not FinishReason.CLOSE for t in g.thoughts]
                for m in micros
                for g in m.groups
            ]
        )
        assert unclosed.any()
        counted = torch.cat([m.counted for m in micros])
        assert torch.equal(counted, ~unclosed if cut == "mask" else torch.ones_like(unclosed))
        penalty = torch.cat([m.penalty for m in micros])
        assert torch.equal(penalty, unclosed * (3.0 if cut == "penalise" else 0.0))
        assert totals.thoughts == int(counted.sum())


def test_8_resume_is_bit_identical(values, tmp_path):
    long = {"max_steps": 8, "checkpoint__every": 4, "baseline__name": "ema", "optim__schedule": "cosine"}
    whole = trained(values, output_dir=str(tmp_path / "whole"), **long)
    folder = tmp_path / "parts"
    run = Run(build(merged(values, output_dir=str(folder), **long)), None)
    steps = run.remaining_steps

    def until_four():
        for step in steps():
            if step == 4:
                return
            yield step

    run.remaining_steps = until_four
    from rlpretrain.training.loop import train

    train(run)
    run.close()
    assert (folder / "checkpoint-4").is_dir()
    assert same(whole, trained(values, resume="auto", output_dir=str(folder), **long))


def test_nan_rewards_are_left_out_of_denominators(values):
    run, batch, totals, _ = batch_of(values)
    stored = tuple(replace(g, rewards=(1.0, math.nan, 0.0, math.nan)) for g in batch.groups)
    assert count(Batch(stored, batch.documents), "force_close").thoughts == totals.thoughts / 2
