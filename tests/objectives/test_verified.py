"""The objective `verified`: rewards follow from token ids; a thought without an end is wrong, and counted."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rlpretrain import Pretrainer
from rlpretrain.config import ConfigError
from rlpretrain.config.io import build
from rlpretrain.corpora import graphs
from rlpretrain.data.stream import read_all
from rlpretrain.objectives import Setting, load_objective
from rlpretrain.objectives.verified import Config, Verified, summarise
from rlpretrain.prompts import ensure_delimiters
from rlpretrain.tracking.metrics import METRICS
from rollout.types import FinishReason, Position, SamplingParams, Thought
from tests.builders.graphs import problem
from tests.builders.runs import merged
from tests.builders.tiny import bpe_tokenizer, tiny_model

REWARDS = ("outcome", "process", "strict", "mixed")
GRAPH = problem(3, seed=5, context="B")
TOKENIZERS = {}
for surface in graphs.SURFACES:
    lines = [graphs.SURFACES[surface].question(problem(4, seed=k, context="B")) for k in range(20)]
    TOKENIZERS[surface] = graphs.tokenizer() if surface == "words" else bpe_tokenizer(lines, 420)
ensure_delimiters(TOKENIZERS["sentences"])


class Scripted:
    """Answers a call with thoughts, the next with the answers of those that closed themselves."""

    def __init__(self, tokenizer, said: list[tuple[str, str | None]]):
        self.tokenizer, self.said, self.calls = tokenizer, said, 0

    def _thought(self, text: str, reason: FinishReason, seed: int = 0) -> Thought:
        ids = tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return Thought(ids, (-1.0,) * len(ids), reason, 0, seed)

    async def sample(self, prompts, params, n, seeds):
        self.calls += 1
        if self.calls == 1:
            thoughts = []
            for seed, (trace, answer) in enumerate(self.said):
                close, reason = (
                    ("", FinishReason.LENGTH) if answer is None else (" </think>", FinishReason.CLOSE)
                )
                thoughts.append(self._thought(f" {trace}{close}", reason, seed))
            return [thoughts for _ in prompts]
        assert all(prompt.stop_strings == (".",) for prompt in prompts) and n == 1
        out = []
        for answer in [answer for _, answer in self.said if answer is not None]:
            ended = FinishReason.CLOSE if answer.endswith(".") else FinishReason.LENGTH
            out.append([self._thought(f" {answer}", ended)])
        return out


def judged(surface: str, said: list[tuple[str, str | None]], **fields):
    """A group of scripted thoughts about GRAPH."""
    tokenizer = TOKENIZERS[surface]
    objective = Verified(Config(**fields), tokenizer)
    objective.setting = Setting(SamplingParams(max_thought_tokens=200), len(said), 0.0)
    question = tuple(tokenizer(graphs.SURFACES[surface].question(GRAPH))["input_ids"])
    position = Position("d", len(question), question, ())
    (group,) = asyncio.run(objective.rollout(Scripted(tokenizer, said), [position], [1]))
    return objective, group


def scripts(surface: str) -> dict[str, tuple[str, str | None]]:
    how = graphs.SURFACES[surface]
    gold, answer = how.trace(GRAPH), how.answer_text(GRAPH)
    wrong_answer = how.answer.format(answer=(GRAPH.answer + 1) % 10)
    shorter = how.trace(replace(GRAPH, query=GRAPH.solution[-1].parents[0]))
    return {
        "gold": (gold, answer),
        "lucky": ("hmm", answer),
        "part": (shorter, answer),
        "wrong": (gold, wrong_answer),
        "empty": ("", wrong_answer),
        "cut": (gold, None),
        "endless": (gold, answer.removesuffix(".") + "so"),
    }


@pytest.mark.parametrize("surface", sorted(graphs.SURFACES))
@pytest.mark.parametrize("reward", REWARDS)
def test_what_a_thought_earns(surface, reward):
    said = scripts(surface)
    _, group = judged(surface, list(said.values()), reward=reward, alpha=0.25)
    needed, known = GRAPH.needed, replace(GRAPH, query=GRAPH.solution[-1].parents[0]).needed
    share = len(known) / len(needed)
    assert 0 < share < 1
    outcome = {"gold": 1, "lucky": 1, "part": 1, "wrong": 0, "empty": 0, "cut": 0, "endless": 0}
    process = {"gold": 1, "lucky": 0, "part": share, "wrong": 1, "empty": 0, "cut": 0, "endless": 0}
    expected = {
        "outcome": outcome,
        "process": process,
        "strict": {name: float(name == "gold") for name in said},
        "mixed": {name: 0.25 * outcome[name] + 0.75 * process[name] for name in said},
    }[reward]
    assert dict(zip(said, group.rewards, strict=True)) == pytest.approx(expected)
    notes = summarise([group])
    assert notes == pytest.approx(
        {
            "verified/verified": 1 / 7,
            "verified/answer_right": 3 / 7,
            "verified/lucky": 2 / 7,
            "verified/process": (2 + share) / 7,
            "verified/malformed": 1 / 7,
            "verified/truncated": 2 / 7,
        }
    )
    assert notes.keys() <= METRICS.keys()
    assert json.loads(json.dumps(group.extra)) == group.extra  # as a store keeps it, for replays


def test_mixed_with_alpha_1_is_outcome_and_with_0_process():
    said = list(scripts("words").values())
    for alpha, other in ((1.0, "outcome"), (0.0, "process")):
        _, mixed = judged("words", said, reward="mixed", alpha=alpha)
        assert mixed.rewards == judged("words", said, reward=other)[1].rewards


@pytest.mark.parametrize("form", ["leave_one_out", "group_normalised", "max_rl"])
def test_equal_rewards_contribute_nothing_and_others_as_their_form_says(form):
    said = scripts("words")
    objective, equal = judged("words", [said["part"]] * 4, reward="process", advantage=form)
    assert (objective.advantage(torch.tensor([equal.rewards]), [equal]) == 0).all()
    _, none_right = judged("words", [said["cut"], said["empty"]], advantage=form)
    assert (objective.advantage(torch.tensor([none_right.rewards]), [none_right]) == 0).all()
    _, mixed = judged("words", [said["gold"], said["cut"], said["empty"], said["wrong"]], advantage=form)
    first = float(objective.advantage(torch.tensor([mixed.rewards]).double(), [mixed])[0, 0])
    assert first == pytest.approx({"leave_one_out": 1, "group_normalised": 0.75 / 0.5001, "max_rl": 3}[form])


def test_a_template_is_no_part_of_the_question():
    said = scripts("sentences")
    template = "How many bees are there? Think between {open} and {close}. {context}\n"
    _, group = judged("sentences", [said["gold"], said["lucky"]], reward="strict", template=template)
    assert group.rewards == (1.0, 0.0)


def test_settings_that_cannot_work():
    for fields, error in (
        ({"verifier": "nowhere:verify"}, "objective.verifier: 'nowhere:verify' cannot be loaded"),
        ({"verifier": "rlpretrain.corpora.graphs:WORDS"}, "is no function"),
        ({"closing": ""}, "objective.closing is empty"),
    ):
        with pytest.raises(ConfigError, match=error):
            judged("words", [("", None)] * 2, **fields)
    objective, _ = judged("words", [("", None)] * 2)
    ids = tuple(TOKENIZERS["words"]("owls is nonsense . ask owls")["input_ids"])
    engine = Scripted(TOKENIZERS["words"], [("hmm", "3 .")] * 2)
    with pytest.raises(
        ConfigError, match=r"document d: .* cannot read the question 'owls is <unk> \. ask owls'"
    ):
        asyncio.run(objective.rollout(engine, [Position("d", 1, ids, ())], [1]))


@pytest.fixture(scope="module")
def corpus_values(tmp_path_factory):
    """A small RL run on a small graphs corpus, from a random model."""
    folder = tmp_path_factory.mktemp("graphs")
    sizes = {"base": 1, "mid": 1, "train": 12, "held_out": 2, "held_out_ops": (1,), "train_ops": (1, 2)}
    paths = graphs.write(folder, graphs.Settings(**sizes))
    tiny_model("qwen3", vocab_size=len(graphs.WORDS), seed=3).save_pretrained(folder / "base")
    graphs.tokenizer().save_pretrained(folder / "base")
    data = {
        "path": str(paths["train"]),
        "column": "question",
        "answer_column": "answer",
        "answer_join": " ",
        "max_length": 64,
    }
    return {
        "model": str(folder / "base"),
        "data": data,
        "objective": {"name": "verified", "reward": "mixed", "max_answer_tokens": 2},
        "sampling": {"thoughts": 4, "max_thought_tokens": 60, "cut": "force_close"},
        "positions_per_step": 4,
        "policy": {"backend": "torch"},
        "max_steps": 2,
        "checkpoint": {"every": 0},
        "save_rollouts": True,
        "console": False,
        "device": "cpu",
        "output_dir": str(folder / "run"),
    }


def test_positions_and_what_follows_them(corpus_values):
    config = build(corpus_values)
    objective = load_objective(config, graphs.tokenizer())
    for document in read_all(config.data, graphs.tokenizer()):
        (position,) = objective.positions(document, np.random.default_rng(0))
        question = graphs.tokenizer().decode(position.context_ids)
        assert graphs.verify(
            question, "", graphs.tokenizer().decode(document.token_ids[position.index :][:2])
        ).answer_right


def test_a_run_logs_its_verdicts(corpus_values):
    Pretrainer(build(corpus_values)).train()
    folder = Path(corpus_values["output_dir"])
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert {name for name in row if name.startswith("verified/")} == {
            f"verified/{name}"
            for name in ("verified", "answer_right", "lucky", "process", "malformed", "truncated")
        }
        assert 0 < row["verified/truncated"] <= 1 and row["thought/uncounted_frac"] == 0
        reward = 0.2 * row["verified/answer_right"] + 0.8 * row["verified/process"]
        assert row["reward"] == pytest.approx(reward)
    replayed = merged(corpus_values, replay=str(folder), output_dir=str(folder.parent / "replay"))
    Pretrainer(build(replayed)).train()
    again = (folder.parent / "replay" / "metrics.jsonl").read_text().splitlines()
    for row, other in zip(rows, map(json.loads, again), strict=True):
        assert all(row[name] == other[name] for name in row if name.startswith("verified/"))


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"sampling__cut": "mask"}, "sampling.cut mask does not fit objective Verified"),
        (
            {"sampling__cut": "penalise", "objective__advantage": "max_rl"},
            "max_rl needs rewards of at least 0.*set sampling.cut to force_close",
        ),
        ({"objective__advantage": "grpo"}, "objective.advantage"),
        ({"objective__alpha": 1.5}, "objective.alpha"),
    ],
)
def test_runs_that_are_refused(corpus_values, tmp_path, changes, error):
    with pytest.raises(ConfigError, match=error):
        Pretrainer(build(merged(corpus_values, output_dir=str(tmp_path / "run"), **changes))).train()


@pytest.mark.parametrize("name", ["rpt", "pretrain_zero"])
def test_other_objectives_have_the_forms_too(name):
    values = {"model": "x", "data": "x", "output_dir": "x", "sampling": {"thoughts": 2}}
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    for form, first in (("leave_one_out", 1.0), ("max_rl", 3.0), (None, 1.0)):
        section = {"name": name} | ({"advantage": form} if form else {})
        objective = load_objective(build(values | {"objective": section}), TOKENIZERS["sentences"])
        assert objective.advantage(rewards, [])[0, 0] == first
