"""BOW: a frozen scorer that reads the thought without its context."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlpretrain.config import ConfigError
from rlpretrain.config.io import build
from rlpretrain.objectives import likelihood
from rlpretrain.objectives.bow import BOW, Config
from rlpretrain.training.loop import add_gradients
from rlpretrain.training.run import Run
from rlpretrain.types import MicroBatch, Scores
from rollout.types import Group, Position, Thought
from tests.builders.runs import merged, one_step, same, trained, weights
from tests.builders.tiny import word_tokenizer

HERE = {"positions": "after", "marker": "shows", "target_length": 2}


def bow(values: dict[str, Any], **own: Any) -> dict[str, Any]:
    baseline = {"name": "frozen", "frozen_every": 0}
    return merged(values, objective={"name": "bow", **HERE, **own}, baseline=baseline)


def scored(run: Run, steps: int = 0) -> tuple[MicroBatch, Scores]:
    """A micro-batch and its scores after some steps."""
    for _ in range(steps):
        batch = run.next_batch()
        add_gradients(run, run.pack(batch, run.count(batch)), None)
        run.update()
        run.sync(run.step + 1)
        run.step += 1
    batch = run.next_batch()
    (micro,) = run.pack(batch, run.count(batch))
    return micro, run.add_references(run.policy.score(micro), micro).detached()


@torch.no_grad()
def probability(model: Any, group: Group, thought: Thought, before: tuple[int, ...]) -> float:
    """p(target | before, thought) by transformers' logits of this sequence alone."""
    closed = thought.finish_reason == "close"
    head = (*before, *thought.token_ids, *(() if closed else group.prompt.close_ids))
    target = group.position.target_ids
    logits = model(torch.tensor([(*head, *target)])).logits[0, len(head) - 1 : -1]
    return float(logits.log_softmax(-1).gather(-1, torch.tensor(target)[:, None]).sum().exp())


@pytest.mark.parametrize("shown", [False, True])
@pytest.mark.parametrize("packing", ["tree", "padded"])
def test_the_reward_is_the_frozen_models_probability(values, packing, shown):
    """After an update, when the policy is another model."""
    run = Run(build(merged(bow(values, show_context=shown), packing=packing)), None)
    micro, scores = scored(run, steps=1)
    got = run.objective.reward(micro.groups, scores)
    run.close()
    live = likelihood.Likelihood.reward(_likelihood(), micro.groups, scores)
    assert not torch.allclose(live, got, rtol=0.05)
    frozen = AutoModelForCausalLM.from_pretrained(values["model"])
    for b, group in enumerate(micro.groups):
        before = group.prompt.token_ids if shown else group.prompt.token_ids[-1:]
        for g, thought in enumerate(group.thoughts):
            assert float(got[b, g]) == pytest.approx(probability(frozen, group, thought, before), rel=1e-4)


def _likelihood() -> likelihood.Likelihood:
    return likelihood.Likelihood(likelihood.Config(score="prob"), word_tokenizer(["<think>", "</think>"]))


@pytest.mark.parametrize("packing", ["tree", "padded"])
def test_with_the_context_shown_it_is_the_likelihood_by_a_frozen_scorer(values, tmp_path, packing):
    """The same number for the same log-probs, and the same first step, when the scorer is the policy."""
    run = Run(build(merged(bow(values, show_context=True), packing=packing)), None)
    micro, scores = scored(run, steps=1)
    by_scorer = replace(scores, target_logps=scores.target_baseline)
    wanted = _likelihood().reward(micro.groups, by_scorer)
    assert torch.equal(run.objective.reward(micro.groups, scores), wanted)
    run.close()
    config = merged(bow(values, show_context=True), packing=packing)
    _, ours = one_step(config, output_dir=str(tmp_path / "bow"))
    section = {"name": "likelihood", "score": "prob", **HERE}
    _, plain = one_step(merged(config, objective=section), output_dir=str(tmp_path / "likelihood"))
    assert same(ours, plain)


@pytest.mark.parametrize("packing", ["tree", "padded"])
def test_another_context_leaves_the_score_unchanged(values, tmp_path, packing):
    """Bit by bit, while the score with the context shown changes."""
    differ = {}
    for shown in (False, True):
        config = merged(bow(values, show_context=shown), packing=packing)
        run = Run(build(config | {"output_dir": str(tmp_path / str(shown))}), None)
        batch = run.next_batch()
        rewards = []
        for shift in (0, 1):
            groups = [_moved(group, shift) for group in batch.groups]
            documents = batch.documents if not shift else ()
            moved = replace(batch, groups=groups, documents=documents)
            (micro,) = run.pack(moved, run.count(moved))
            scores = run.target_baseline(run.policy.score(micro), micro)
            reward = run.objective.reward(micro.groups, scores)
            rewards.append({group.id: row for group, row in zip(micro.groups, reward, strict=True)})
        run.close()
        first, second = (torch.stack([by_id[id_] for id_ in rewards[0]]) for by_id in rewards)
        differ[shown] = float((second / first).log().abs().max())
    assert differ[False] == 0 and differ[True] > 0.01


def _moved(group: Group, shift: int) -> Group:
    """The group behind another context: the same ids, turned by `shift`, in a document that is not known."""
    context = group.position.context_ids
    turned = (*context[shift:], *context[:shift])
    tail = group.prompt.token_ids[len(context) :]
    position = replace(
        group.position, context_ids=turned, document_id=f"{group.position.document_id}+{shift}"
    )
    if not shift:
        position = group.position
    return replace(group, position=position, prompt=replace(group.prompt, token_ids=(*turned, *tail)))


def test_the_scorers_prompt():
    """The open tag alone; a beginning of text stays, template and context do not."""
    tokenizer = word_tokenizer(["<think>", "</think>", "read", "this", "a", "b"])
    made = BOW(Config(template="read {context} this"), tokenizer)
    position = Position("d", 2, tuple(tokenizer.convert_tokens_to_ids(["a", "b"])), (7,))
    group = Group("g", position, made.prompt(position), (), 0)
    assert made.baseline_prompt(group).token_ids == (made.template.open_id,)
    assert made.baseline_prompt(group).close_ids == (made.template.close_id,)
    made.template.bos = position.context_ids[0]  # as if documents began with it
    group = replace(group, prompt=made.prompt(position))
    assert made.baseline_prompt(group).token_ids == (made.template.bos, made.template.open_id)


def test_tree_and_padded_rows_train_alike(values, tmp_path):
    """The policy gradient alone, since the probabilities of a random model are small."""
    loss = {"ntp_coef": 0.0, "reader_coef": 0.0, "policy_coef": 1e4}
    gradients = []
    for packing, budget in (("tree", 16384), ("padded", 16384), ("tree", 60)):
        config = merged(bow(values), packing=packing, token_budget=budget, loss=loss)
        gradients.append(one_step(config, output_dir=str(tmp_path / f"{packing}{budget}"))[1])
    largest = max(float(g.abs().max()) for g in gradients[0].values())
    assert largest > 1e-3
    assert all(same(gradients[0], gradient, within=1e-3 * largest) for gradient in gradients[1:])


def test_a_resumed_run_ends_with_the_same_weights(values, tmp_path):
    config = merged(bow(values), max_steps=4, checkpoint={"every": 2, "keep": 3})
    config["baseline"] = {"name": "ema", "decay": 0.5, "frozen_every": 0}
    whole = trained(config, output_dir=str(tmp_path / "whole"))
    trained(config, resume=str(tmp_path / "whole" / "checkpoint-2"), output_dir=str(tmp_path / "whole"))
    assert same(whole, weights(tmp_path / "whole" / "model"))


@pytest.mark.parametrize("name", ["none", "self"])
def test_a_scorer_that_is_the_policy_is_refused(values, name):
    with pytest.raises(ConfigError, match=f"baseline.name {name} does not fit objective BOW.*frozen or ema"):
        Run(build(merged(bow(values), baseline__name=name)), None)
