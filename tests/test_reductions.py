"""How a thought's tokens are weighed: the paper's way, the user's, and what is the gradient of an
expectation (issue 15.14).
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlpretrain import Pretrainer
from rlpretrain.config import ConfigError, LossConfig
from rlpretrain.config.io import build
from rlpretrain.objectives import available, parse_section
from rlpretrain.objectives.likelihood import Config, Likelihood
from rlpretrain.training.losses import clipped_surrogate, target_loss
from rlpretrain.training.run import Run
from rlpretrain.types import Scores
from tests.builders.runs import merged
from tests.builders.tiny import word_tokenizer

HERE = {"positions": "after", "marker": "shows", "target_length": 2}


@pytest.mark.parametrize(
    ("reduction", "weight"),
    [
        ("thought_mean", lambda size, thoughts, tokens: 1 / size),
        ("token_mean", lambda size, thoughts, tokens: thoughts / tokens),
        ("sum", lambda size, thoughts, tokens: 1.0),
    ],
)
@pytest.mark.parametrize("budget", [60, 16384])
def test_the_weight_of_a_token(values, reduction, weight, budget):
    run = Run(
        build(
            merged(values, loss__reduction=reduction, token_budget=budget, sampling__max_thought_tokens=20)
        ),
        None,
    )
    batch = run.next_batch()
    totals = run.count(batch)
    sizes = set()
    for micro in run.pack(batch, totals):
        for b, g in micro.counted.nonzero().tolist():
            mine = micro.token_weights[b, g][micro.thought_mask[b, g]]
            wanted = weight(len(mine), totals.thoughts, totals.thought_tokens)
            assert mine.tolist() == pytest.approx([wanted] * len(mine), rel=1e-6)
            sizes.add(len(mine))
    run.close()
    assert len(sizes) > 1


def settled(values: dict[str, Any], objective: dict[str, Any], **changes: Any) -> str:
    folder = f"{values['output_dir']} {len(list(Path(values['output_dir']).parent.iterdir()))}"
    run = Run(build(merged(values, objective=objective, output_dir=folder, **changes)), None)
    run.close()
    assert run.layout.reduction == run.objective.setting.reduction
    kept = json.loads((run.folder / "run.json").read_text())["config"]["loss"]["reduction"]
    assert kept == run.layout.reduction  # what `auto` came to
    return kept


def test_auto_is_what_the_paper_has(values):
    """VeriFree and JEPO: a sum, as their direct term has no 1/|c|. RLP: the mean over a thought's tokens."""

    def likelihood(score: str, direct: float) -> dict[str, Any]:
        return {"name": "likelihood", "score": score, "direct": direct, **HERE}

    assert settled(values, likelihood("prob", 1.0)) == settled(values, likelihood("jepo", 1.0)) == "sum"
    assert (
        settled(values, {"name": "rlp", **HERE}) == settled(values, likelihood("jepo", 0.0)) == "thought_mean"
    )
    for chosen in ("thought_mean", "token_mean"):
        assert settled(values, likelihood("prob", 1.0), loss__reduction=chosen) == chosen
    assert settled(values, {"name": "rlp", **HERE}, loss__reduction="sum") == "sum"
    with pytest.raises(ConfigError, match="loss.reduction"):
        build(merged(values, loss__reduction="mean"))


def test_every_objective_names_a_reduction_that_there_is():
    for name in available():
        owner, _ = parse_section({"name": name})
        assert owner.token_reduction in ("thought_mean", "token_mean", "sum"), name


def test_a_checkpoint_from_before_auto_is_resumed(values):
    """It says thought_mean, which is what `auto` is for RLP; for VeriFree it is another loss, and is
    refused.
    """
    long = {"checkpoint__every": 2, "max_steps": 2}
    Pretrainer(build(merged(values, loss__reduction="thought_mean", **long))).train()
    run = Run(build(merged(values, **long | {"max_steps": 3})), "auto")
    run.close()
    assert run.step == 2
    direct = {"name": "likelihood", "score": "prob", "direct": 1.0, **HERE}
    other = merged(values, objective=direct, output_dir=values["output_dir"] + "2", **long)
    Pretrainer(build(merged(other, loss__reduction="thought_mean"))).train()
    with pytest.raises(ConfigError, match="loss.reduction"):
        Run(build(other), "auto")


# the gradient of an expectation, by enumeration: a thought is (stop), (a, stop) or (a, a), so thoughts differ
# in length

THOUGHTS = ((0,), (1, 0), (1, 1))


def logps(theta: torch.Tensor) -> list[list[torch.Tensor]]:
    """log pi of each token of each thought: two states, each with its own chance to stop."""
    chances = torch.nn.functional.logsigmoid(torch.stack([theta[:2], -theta[:2]], dim=1))
    return [[chances[t, token] for t, token in enumerate(thought)] for thought in THOUGHTS]


def expected_gradient(score: str, reduction: str, theta: torch.Tensor) -> torch.Tensor:
    """Minus the expected gradient of the library's loss, over all groups of two thoughts."""
    objective = Likelihood(Config(score=score, direct=1.0), word_tokenizer(["<think>", "</think>"]))
    objective.setting = SimpleNamespace(reader_coef=0.0)
    leaf = theta.clone().requires_grad_()
    total = torch.zeros(())
    for pair in itertools.product(range(3), repeat=2):
        sampled, target = logps(leaf), torch.nn.functional.logsigmoid(leaf[2:])
        mask = torch.zeros(1, 2, 2, dtype=torch.bool)
        thought, weight = torch.zeros(1, 2, 2, dtype=torch.float64), torch.zeros(1, 2, 2, dtype=torch.float64)
        for g, c in enumerate(pair):
            for t, logp in enumerate(sampled[c]):
                place = torch.zeros_like(weight)
                place[0, g, t] = 1.0
                thought, weight = (
                    thought + place * logp,
                    weight + place / (1 if reduction == "sum" else len(sampled[c])),
                )
                mask[0, g, t] = True
        after = torch.stack([target[c] for c in pair]).reshape(1, 2, 1)
        counted = torch.ones(1, 2, dtype=torch.bool)
        scores = Scores(
            thought, after, torch.zeros(1, 1), torch.zeros(0), torch.ones(1, 1, dtype=torch.bool), counted
        )
        micro = SimpleNamespace(thought_mask=mask, token_weights=weight, on_policy=True)
        reward = objective.reward((), scores.detached())
        surrogate, _ = clipped_surrogate(scores, micro, objective.advantage(reward, ()), LossConfig())
        loss = (surrogate + target_loss(scores, objective.target_weights((), scores))) / 2
        chance = torch.stack([sum(logps(theta)[c]) for c in pair]).sum().exp()
        total = total - chance * loss
    return torch.autograd.grad(total, leaf)[0]


def true_gradient(score: str, theta: torch.Tensor) -> torch.Tensor:
    """Of the expected score."""
    leaf = theta.clone().requires_grad_()
    sampled, p = logps(leaf), torch.sigmoid(leaf[2:])
    value = torch.zeros(())
    for pair in itertools.product(range(3), repeat=2):
        both = torch.stack([p[c] for c in pair])
        worth = {"prob": both.mean(), "log_prob": both.log().mean(), "jepo": both.mean().log()}[score]
        value = value + torch.stack([sum(sampled[c]) for c in pair]).sum().exp() * worth
    return torch.autograd.grad(value, leaf)[0]


@pytest.mark.parametrize("score", ["prob", "log_prob", "jepo"])
def test_the_sum_is_the_gradient_of_the_expected_score_and_the_mean_is_not(score):
    theta = torch.tensor([0.3, -0.5, 1.0, -0.7, 0.2], dtype=torch.float64)
    wanted = true_gradient(score, theta)
    torch.testing.assert_close(expected_gradient(score, "sum", theta), wanted, rtol=1e-9, atol=1e-12)
    biased = expected_gradient(score, "thought_mean", theta)
    assert float((biased - wanted).norm() / wanted.norm()) > 0.05
    torch.testing.assert_close(
        biased[2:], wanted[2:], rtol=1e-9, atol=1e-12
    )  # the direct term's part is right
