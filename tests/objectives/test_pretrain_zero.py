"""PretrainZero: which spans will do, what both roles earn, and runs with real sampling."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from rlpretrain.config.io import build
from rlpretrain.evaluation.evaluate import evaluate
from rlpretrain.objectives import Setting
from rlpretrain.objectives.pretrain_zero import Config, PretrainZero
from rlpretrain.prompts import ensure_delimiters
from rlpretrain.training.loop import train
from rlpretrain.training.run import Run
from rlpretrain.types import Document
from rollout.types import FinishReason, SamplingParams, Thought
from tests.builders.runs import merged
from tests.builders.tiny import bpe_tokenizer

TEXT = "the cat sat on the mat and the catalogue lay by the cat."
BPE = bpe_tokenizer([TEXT, "\\mask{the cat} \\boxed{the cat} [mask] <think>"], 330)
ensure_delimiters(BPE)
OPEN, CLOSE = BPE.convert_tokens_to_ids(["<think>", "</think>"])


def ids(text: str) -> tuple[int, ...]:
    return tuple(BPE(text)["input_ids"])


def zero(**fields) -> PretrainZero:
    objective = PretrainZero(Config(template="{context}", predictor_template="{context}", **fields), BPE)
    objective.setting = Setting(SamplingParams(max_thought_tokens=8), 4, 0.0)
    return objective


def said(text: str) -> Thought:
    head = (*ids("so"), CLOSE)
    tokens = head + ids(text)
    return Thought(tokens, (-1.0,) * len(tokens), FinishReason.CLOSE, 0, 0, (len(head), len(tokens)))


@pytest.mark.parametrize(
    ("named", "span"),
    [
        ("\\mask{sat}", "sat"),
        ("\\mask{ sat on }", "sat on"),
        ("\\mask{the cat}", "the cat"),
        ("\\mask{cat.}", "cat."),
        ("\\mask{at on}", None),  # begins within a word
        ("\\mask{catalog}", None),
        ("\\mask{dog}", None),
        ("\\mask{cat mat}", None),  # not there, not in one piece
        ("\\mask{}", None),
        ("\\mask{ }", None),
        ("\\mask{sat", None),
        ("sat", None),
        ("\\boxed{sat}", None),
        ("\\mask{dog} \\mask{mat}", "mat"),
        ("\\mask{mat} \\mask{dog}", None),  # the last one counts
        ("\\mask{[mask]}", None),
        ("\\mask{<think>}", None),
        ("\\mask{sat </think>}", None),
    ],
)
def test_spans_that_will_do(named, span):
    assert zero().span(said(named), TEXT + " [mask] <think> sat </think>") == span


def test_spans_that_occur_too_often_or_are_too_long():
    assert (
        zero().span(said("\\mask{the}"), TEXT) == "the"
        and zero(max_occurrences=3).span(said("\\mask{the}"), TEXT) is None
    )
    assert zero(max_occurrences=2).span(said("\\mask{cat}"), TEXT) == "cat"  # the catalogue is none
    assert zero(max_occurrences=1).span(said("\\mask{cat}"), TEXT) is None
    assert zero(max_span_tokens=1).span(said("\\mask{sat on the mat}"), TEXT) is None
    assert (
        zero().span(Thought((1,), (0.0,), FinishReason.LENGTH, 0, 0), TEXT) is None
    )  # it never closed its thought


def test_the_first_occurrence_is_hidden():
    objective = zero()
    (position,) = objective.positions(Document("d", (*ids(TEXT), BPE.eos_token_id)), None)
    assert position.index == len(ids(TEXT)) + 1 and position.target_ids == ()
    hidden = BPE.decode(objective.hidden(objective.text(position), "cat"))
    assert hidden == "the [mask] sat on the mat and the catalogue lay by the cat."


class Scripted:
    """Thoughts that close at once; what they come to say is in `answers`, by the text of the prompt."""

    def __init__(self, generator: list[str], predictor: dict[str, list[str]]):
        self.generator, self.predictor, self.turn = generator, predictor, {}

    async def sample(self, prompts, params, n, seeds):
        out = []
        for prompt in prompts:
            if not prompt.stop_strings:
                out.append(
                    [
                        Thought(
                            (*ids(f"t{k}"), CLOSE),
                            (-1.0,) * (len(ids(f"t{k}")) + 1),
                            FinishReason.CLOSE,
                            3,
                            k,
                        )
                        for k in range(n)
                    ]
                )
                continue
            text = BPE.decode(prompt.token_ids)
            paragraph = text.split("<think>")[0]
            answers = self.generator if "[mask]" not in paragraph else self.predictor[paragraph]
            k = self.turn.get(paragraph, 0)
            self.turn[paragraph] = k + 1
            tokens = ids(answers[k])
            out.append([Thought(tokens, (-2.0,) * len(tokens), FinishReason.CLOSE, 3, 0)])
        return out


def test_what_both_roles_earn():
    objective = zero()
    (position,) = objective.positions(Document("d", ids(TEXT)), None)
    mat = "the cat sat on the [mask] and the catalogue lay by the cat."
    sat = "the cat [mask] on the mat and the catalogue lay by the cat."
    lay = "the cat sat on the mat and the catalogue [mask] by the cat."
    engine = Scripted(
        ["\\mask{mat}", "\\mask{sat}", "\\mask{mat}", "\\mask{lay}"],  # mat twice
        {
            mat: ["\\boxed{mat}", "\\boxed{rug}", "\\boxed{ mat }", "\\boxed{mat}"],  # three of four
            sat: ["\\boxed{lay}", "sat", "\\boxed{}", "\\boxed{sat"],  # nobody
            lay: ["\\boxed{lay}"] * 4,
        },
    )
    groups = asyncio.run(objective.rollout(engine, [position], [7]))
    maker, *finders = groups
    assert maker.role == "generator" and maker.rewards == (0.25, 0.0, 0.25, 0.0)
    assert [(f.role, f.parent_id, f.extra["span"], f.rewards) for f in finders] == [
        ("predictor", maker.id, "mat", (1.0, 0.0, 1.0, 1.0)),
        ("predictor", maker.id, "sat", (0.0,) * 4),
        ("predictor", maker.id, "lay", (1.0,) * 4),
    ]
    assert len({g.id for g in groups}) == 4
    assert objective.select(groups) == [maker, finders[0]]  # accuracy 0 and 1 teach a predictor nothing
    assert zero(dynamic_sampling=False).select(groups) == groups


def test_a_generator_that_names_nothing_asks_for_nothing():
    objective = zero()
    (position,) = objective.positions(Document("d", ids(TEXT)), None)
    (group,) = asyncio.run(objective.rollout(Scripted(["dog"] * 4, {}), [position], [7]))
    assert group.rewards == (0.0,) * 4 and objective.select([group]) == []


REAL = {
    "name": "pretrain_zero",
    "template": "{context}",
    "predictor_template": "{context}",
    "mask": "hmm",
    "closing": ".",
    "max_answer_tokens": 9,
}
BRIEF = {
    "positions_per_step": 4,
    "sampling__cut": "force_close",
    "sampling__thoughts": 8,
    "sampling__max_thought_tokens": 99,
}


def test_a_model_that_names_nothing_trains_on_its_documents(values):
    run = Run(build(merged(values, objective=REAL, **BRIEF)), None)
    batch = run.next_batch()
    assert batch.groups == () and len(batch.documents) == 4  # all earned 0
    train(run)
    run.close()
    assert run.step == 3 and run.last["ntp/loss"] > 0


def test_both_roles_are_trained_in_real_runs(values, monkeypatch):
    """Any word that a random model says first counts as named; what is named is hidden and asked for."""

    def first(objective, thought, text=None):
        words = objective.answer_text(thought).split()
        return words[0] if words and (text is None or words[0] in text.split()) else None

    monkeypatch.setattr(PretrainZero, "span", first)
    monkeypatch.setattr(PretrainZero, "prediction", first)
    run = Run(build(merged(values, objective=REAL | {"dynamic_sampling": False}, **BRIEF)), None)
    batch = run.next_batch()
    roles = [g.role for g in batch.groups]
    assert roles.count("generator") == 4 and roles.count("predictor") >= 1
    for group in batch.groups:
        if group.role == "predictor":
            words = run.tokenizer.decode(group.prompt.token_ids).split()
            assert "hmm" in words and group.parent_id in {g.id for g in batch.groups}
    micros = run.pack(batch, run.count(batch))
    trained = {g.id for m in micros for g in m.groups}
    assert trained == {g.id for g in batch.groups}
    train(run)
    run.close()
    assert run.step == 3 and run.last["grad_norm"] > 0


def test_evaluation_has_the_generators_reward_and_the_predictors_accuracy(values, monkeypatch):
    objective = {
        "name": "pretrain_zero",
        "template": "{context}",
        "predictor_template": "{context}",
        "mask": "hmm",
    }
    run = Run(build(merged(values, objective=objective)), None)
    documents = run.source.stream.take(3)
    whole = run.objective.rollout

    async def with_children(engine, positions, seeds):
        groups = await whole(engine, positions, seeds)
        children = [
            replace(g, id=f"{g.id} child", parent_id=g.id, rewards=(1.0, 0.0, 1.0, 1.0)) for g in groups[1:]
        ]
        return groups + children

    monkeypatch.setattr(run.objective, "rollout", with_children)
    found = evaluate(run.policy.model, run.objective, documents, thoughts=4)
    run.close()
    assert found.values["asked"].tolist() == [0.0, 0.75, 0.75] and len(found.groups) == 3
    assert set(found.values) == {"reward", "asked", "unclosed", "length"}
    assert found.summary()["reward"] == 0.0
