"""LaTRO: its reward, its gradient by enumeration, and what it reduces to."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlpretrain.config import ConfigError, LossConfig
from rlpretrain.config.io import build
from rlpretrain.corpora import dial
from rlpretrain.objectives.latro import Config, LaTRO, double_mean
from rlpretrain.training.losses import clipped_surrogate, target_loss
from rlpretrain.training.run import Run
from rlpretrain.types import Scores
from rollout.types import FinishReason, Group, Position, Prompt, Thought
from tests.builders.runs import merged, one_step, same, trained, weights
from tests.builders.tiny import tiny_model, word_tokenizer

HERE = {"positions": "after", "marker": "shows", "target_length": 2}


@pytest.fixture(scope="module")
def other(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A second checkpoint with the vocabulary of the corpus."""
    folder = tmp_path_factory.mktemp("other")
    tiny_model("qwen3", vocab_size=len(dial.WORDS), seed=8).save_pretrained(folder)
    dial.tokenizer().save_pretrained(folder)
    return str(folder)


def latro(values: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A run of LaTRO; changes are fields of the objective, or `section__field` of the run."""
    own = {name: value for name, value in changes.items() if "__" not in name and name in vars(Config())}
    rest = {name: value for name, value in changes.items() if name not in own}
    return merged(values, objective={"name": "latro", **HERE, **own}, **rest)


def likelihood(values: dict[str, Any], direct: float = 1.0, **changes: Any) -> dict[str, Any]:
    return merged(values, objective={"name": "likelihood", "direct": direct, **HERE}, **changes)


@pytest.mark.parametrize("direct", [1.0, 0.0, 0.5])
def test_without_beta_it_is_the_log_probability(values, tmp_path, direct):
    """Bit by bit, over a whole run."""
    ours = trained(latro(values, beta=0.0, direct=direct), output_dir=str(tmp_path / "latro"))
    assert same(ours, trained(likelihood(values, direct), output_dir=str(tmp_path / "likelihood")))


@pytest.mark.parametrize("packing", ["tree", "padded"])
def test_the_divergence_is_exactly_0_in_the_first_step(values, tmp_path, packing):
    """So that its gradient is that without β, and no longer in the second."""
    common = {"packing": packing, "sampling__temperature": 0.7}
    run, ours = one_step(latro(values, beta=5.0, **common), output_dir=str(tmp_path / "latro"))
    _, plain = one_step(likelihood(values, **common), output_dir=str(tmp_path / "likelihood"))
    assert same(ours, plain) and run.last["reference/kl"] == 0
    trained(latro(values, beta=5.0, max_steps=2, **common), output_dir=str(tmp_path / "two"))
    rows = [json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["reference/kl"] == 0 and abs(rows[1]["reference/kl"]) > 1e-3


@pytest.mark.parametrize("packing", ["tree", "padded"])
def test_the_reward_is_the_formula_on_logits_of_transformers(values, other, packing):
    run = Run(
        build(latro(values, beta=0.3, packing=packing, reference=other, sampling__temperature=0.7)), None
    )
    batch = run.next_batch()
    (micro,) = run.pack(batch, run.count(batch))
    scores = run.add_references(run.policy.score(micro), micro)
    got = run.objective.reward(micro.groups, scores.detached())
    run.close()
    policy, frozen = (AutoModelForCausalLM.from_pretrained(path) for path in (values["model"], other))

    @torch.no_grad()
    def logp(model: Any, before: tuple[int, ...], ids: tuple[int, ...], temperature: float) -> float:
        logits = model(torch.tensor([(*before, *ids)])).logits[0, len(before) - 1 : -1] / temperature
        return float(logits.double().log_softmax(-1).gather(-1, torch.tensor(ids)[:, None]).sum())

    for b, group in enumerate(micro.groups):
        prompt = group.prompt.token_ids
        for g, thought in enumerate(group.thoughts):
            closed = thought.finish_reason is FinishReason.CLOSE
            before = (*prompt, *thought.token_ids, *(() if closed else group.prompt.close_ids))
            ratio = logp(policy, prompt, thought.token_ids, 0.7) - logp(
                frozen, prompt, thought.token_ids, 0.7
            )
            wanted = logp(policy, before, group.position.target_ids, 1.0) - 0.3 * ratio
            assert float(got[b, g]) == pytest.approx(wanted, abs=1e-4)


# the gradient of the bound, by enumeration: a thought is (stop), (a, stop) or (a, a)

THOUGHTS = ((0,), (1, 0), (1, 1))
THETA = torch.tensor([0.3, -0.5, 1.0, -0.7, 0.2], dtype=torch.float64)
START = torch.tensor([-0.2, 0.8], dtype=torch.float64)


def logps(theta: torch.Tensor) -> list[list[torch.Tensor]]:
    """log pi of each token of each thought: two states, each with its own chance to stop."""
    chances = torch.nn.functional.logsigmoid(torch.stack([theta[:2], -theta[:2]], dim=1))
    return [[chances[t, token] for t, token in enumerate(thought)] for thought in THOUGHTS]


def pair_scores(leaf: torch.Tensor, pair: tuple[int, int]) -> tuple[Scores, Any]:
    """What the library sees of two sampled thoughts."""
    mask, thought, reference = torch.zeros(1, 2, 2, dtype=torch.bool), [], []
    for g, c in enumerate(pair):
        mask[0, g, : len(THOUGHTS[c])] = True
        missing = [torch.zeros(())] * (2 - len(THOUGHTS[c]))
        thought += logps(leaf)[c] + missing
        reference += logps(START)[c] + missing
    after = torch.nn.functional.logsigmoid(leaf[2:])[list(pair)].reshape(1, 2, 1)
    one = torch.ones(1, 2, dtype=torch.bool)
    scores = Scores(
        torch.stack(thought).reshape(1, 2, 2),
        after,
        torch.zeros(1, 1),
        torch.zeros(0),
        one[:, :1],
        one,
        thought_reference=torch.stack(reference).reshape(1, 2, 2),
    )
    return scores, SimpleNamespace(thought_mask=mask, token_weights=mask.double(), on_policy=True)


def expected_gradient(beta: float) -> torch.Tensor:
    """Minus the expected gradient of the library's loss, over all groups of two thoughts."""
    objective = LaTRO(Config(beta=beta), word_tokenizer(["<think>", "</think>"]))
    objective.setting = SimpleNamespace(reader_coef=0.0)  # type: ignore[assignment]
    leaf = THETA.clone().requires_grad_()
    total = torch.zeros(())
    for pair in itertools.product(range(3), repeat=2):
        scores, micro = pair_scores(leaf, pair)
        advantage = objective.advantage(objective.reward((), scores.detached()), ())
        surrogate, _ = clipped_surrogate(scores, micro, advantage, LossConfig())
        loss = (surrogate + target_loss(scores, objective.target_weights((), scores))) / 2
        total = total - torch.stack([sum(logps(THETA)[c]) for c in pair]).sum().exp() * loss
    return torch.autograd.grad(total, leaf)[0]


@pytest.mark.parametrize("beta", [0.0, 0.3, 2.0])
def test_the_loss_has_the_gradient_of_the_bound(beta):
    leaf = THETA.clone().requires_grad_()
    ours = torch.stack([sum(tokens) for tokens in logps(leaf)])
    start = torch.stack([sum(tokens) for tokens in logps(START)])
    bound = (ours.exp() * (torch.nn.functional.logsigmoid(leaf[2:]) - beta * (ours - start))).sum()
    wanted = torch.autograd.grad(bound, leaf)[0]
    torch.testing.assert_close(expected_gradient(beta), wanted, rtol=1e-9, atol=1e-12)


def test_tree_and_padded_rows_train_alike(values, other, tmp_path):
    gradients = []
    for packing, budget in (("tree", 16384), ("padded", 16384), ("tree", 60)):
        config = latro(values, beta=0.3, reference=other, packing=packing, token_budget=budget)
        gradients.append(one_step(config, output_dir=str(tmp_path / f"{packing}{budget}"))[1])
    assert all(same(gradients[0], gradient, within=1e-5) for gradient in gradients[1:])


def test_a_resumed_run_ends_with_the_same_weights(values, other, tmp_path):
    config = latro(values, beta=0.3, reference=other, unclosed="double_mean", max_steps=4)
    config["checkpoint"] = {"every": 2, "keep": 3}
    whole = trained(config, output_dir=str(tmp_path / "whole"))
    trained(config, resume=str(tmp_path / "whole" / "checkpoint-2"), output_dir=str(tmp_path / "whole"))
    assert same(whole, weights(tmp_path / "whole" / "model"))


def group_of(closed: str) -> Group:
    """A group whose thoughts closed themselves where there is a 1."""
    reasons = [FinishReason.CLOSE if c == "1" else FinishReason.LENGTH for c in closed]
    thoughts = tuple(Thought((4,), (0.0,), reason, 0, 0) for reason in reasons)
    return Group(closed, Position("d", 1, (3,), (5,)), Prompt((3,), (4,)), thoughts, 0)


def test_an_unclosed_thought_has_twice_the_mean_of_the_closed_ones():
    nan = math.nan
    groups = [group_of(closed) for closed in ("1101", "1110", "0000", "1010")]
    rewards = torch.tensor(
        [[-1.0, -2.0, -9.0, -3.0], [2.0, 1.0, 3.0, 9.0], [-1.0, -2.0, -3.0, -4.0], [-1.0, nan, nan, -7.0]],
        dtype=torch.float64,
    )
    wanted = rewards.clone()
    wanted[0, 2], wanted[1, 3], wanted[3, 3] = -4.0, 2.0, -2.0
    assert torch.equal(double_mean(rewards, groups).nan_to_num(7.5), wanted.nan_to_num(7.5))
    objective = LaTRO(Config(unclosed="double_mean"), word_tokenizer(["<think>", "</think>"]))
    advantage = objective.advantage(rewards, groups)
    assert float(advantage[0, 2]) == pytest.approx(-4 - (-1 - 2 - 3) / 3)


def test_bad_settings_are_refused(values):
    for changes, said in (
        ({"beta": -0.1}, "objective.beta"),
        ({"direct": -1.0}, "objective.direct"),
        ({"unclosed": "mean"}, "objective.unclosed"),
        ({"beta": 0.0, "reference": values["model"]}, "'reference.path' is set, but objective LaTRO uses no"),
        ({"unclosed": "double_mean", "sampling__cut": "mask"}, "has no effect with sampling.cut mask"),
    ):
        with pytest.raises(ConfigError, match=said):
            Run(build(latro(values, **changes)), None)
