"""The dial in every method's format: what the base reads is what each objective asks for, rewards, and
judges.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given

from rlpretrain.config.io import build, load_config
from rlpretrain.corpora import dial, dial_family
from rlpretrain.data.stream import read_all
from rlpretrain.experiments.loading import load_experiment
from rlpretrain.judge import Judge
from rlpretrain.objectives import load_objective
from rlpretrain.types import Document
from rollout.types import FinishReason, Group, Position, Thought
from tests.builders.dial import PROBLEMS, compute

FAMILY = Path(__file__).parents[1] / "examples" / "dial_family"
TOKENIZER = dial_family.tokenizer()


def ids(text: str) -> tuple[int, ...]:
    return tuple(TOKENIZER(text)["input_ids"])


def objective(name: str, **fields):
    """The objective of an example configuration."""
    values = yaml.safe_load((FAMILY / f"{name}.yaml").read_text())
    values["objective"] |= fields
    return load_objective(build(values), TOKENIZER)


def formatted(kind: str, count: int = 40) -> list[str]:
    rng = random.Random(3)
    return [" ".join(dial_family.FORMATS[kind](rng, dial_family.MIXES["f1"])) for _ in range(count)]


@given(PROBLEMS)
def test_documents_are_true(problem):
    words = dial_family.document(problem)
    end = words.index(".")
    assert (
        words[end + 1 : end + 3] == ["it", "shows"]
        and int(words[end + 3]) == compute(words[:end]) == problem.answer
    )
    assert words[-2] == ("odd" if problem.answer % 2 else "even")
    row = dial_family.record(problem)
    assert row["text"].split() == words
    trace = row["worked_answer"].split(f"{dial.OPEN} ")[1].split(f" {dial.CLOSE}")[0]
    assert dial.verify(" ".join(problem.trace()), trace) == (True, 1.0)
    assert [*row["question"].split(), *row["worked_answer"].split(f"{dial.CLOSE} ")[1].split()] == words


def test_shares_words_and_seeds():
    mix, n = dial_family.MIXES["f1"], 4000
    assert sum(getattr(mix, kind) for kind in dial_family.FORMATS) == pytest.approx(1.0)
    texts = list(dial.base_documents(n, 1, mix, dial_family.FORMATS))
    assert texts == list(dial.base_documents(n, 1, mix, dial_family.FORMATS))
    first = Counter(t.split()[0] for t in texts)
    for task in dial_family.TASKS:
        assert first[task] / n == pytest.approx(getattr(mix, task), abs=0.015), task
    for text in texts:
        assert TOKENIZER.unk_token_id not in ids(text) and TOKENIZER.decode(ids(text)) == text


@pytest.mark.parametrize("kind", ["box", "tell", "fill", "hide", "find", "think", "sentence"])
def test_prompts_of_the_examples_are_what_the_base_has_read(kind):
    """Every document of a format begins, up to its thought, as the objective's prompt does; what follows
    earns its reward.
    """
    name = {
        "box": "rpt",
        "tell": "rlpt_judge",
        "fill": "rlpt_judge",
        "hide": "pretrain_zero",
        "find": "pretrain_zero",
        "think": "rlp",
        "sentence": "rlpt",
    }[kind]
    made, seen = objective(name), 0
    for text in formatted(kind):
        if dial.OPEN not in text:
            continue  # a middle segment without a thought
        head, _, rest = text.partition(f" {dial.OPEN} ")
        words = head.split()
        plain = words[1:] if words[0] in dial_family.TASKS else words
        document = Document("d", ids(" ".join(plain)))
        if kind == "fill":
            at = plain.index("<MASK>")
            position = Position(
                "d", at, ids(" ".join(plain[:at])), ids("it shows 1 ."), ids(" ".join(plain[at + 1 :]))
            )
            prompt = made.prompt(position)
        elif kind == "find":
            prompt = made.predictor(Position("d", 1, ids(" ".join(plain)), ()))
        else:
            position = Position("d", len(document.token_ids), document.token_ids, ())
            prompt = made.prompt(position)
        assert TOKENIZER.decode(prompt.token_ids) == f"{head} {dial.OPEN}"
        thought, _, said = rest.partition(f" {dial.CLOSE} ")
        sampled = Thought(
            ids(f"{thought} {dial.CLOSE} {said}"),
            (0.0,) * len(ids(rest)),
            FinishReason.CLOSE,
            0,
            0,
            (len(ids(thought)) + 1, len(ids(rest))),
        )
        if kind == "box":
            answer = made.prediction(sampled).decode()
            assert answer.split()[0].isdigit()
        elif kind == "tell" or kind == "fill" and dial_family.SAY in said:
            assert made.written(sampled).split()[:2] == ["it", "shows"]
        elif kind == "hide":
            assert made.span(sampled, " ".join(plain)) is not None
        elif kind == "find":
            assert made.prediction(sampled)
        seen += 1
    assert seen > 15


def test_positions_of_the_examples(tmp_path):
    paths = dial_family.write(tmp_path, base=1, train=30, held_out=1)
    tokenizer = dial_family.tokenizer()
    for name in (
        "rlp",
        "rpt",
        "rlpt",
        "rlpt_judge",
        "pretrain_zero",
        "likelihood",
        "latro",
        "quiet_star",
        "nover",
        "bow",
        "random_reward",
        "format_only",
    ):
        config = load_config(FAMILY / f"{name}.yaml", ["--data.path", str(paths["train"])])
        made = load_objective(config, tokenizer)
        for document in read_all(config.data, tokenizer):
            (position,) = made.positions(document, np.random.default_rng(0))
            text, target = tokenizer.decode(position.context_ids), tokenizer.decode(position.target_ids)
            if name.startswith("rlpt"):
                assert text.endswith(" .") and target.startswith("it shows") and "shows" not in text
            elif name != "pretrain_zero":
                assert text.endswith("it shows") and target.split()[0].isdigit()


def test_traces_for_sft_are_prompts_with_answers(tmp_path):
    paths = dial_family.write(tmp_path, base=1, train=20, held_out=1)
    config = load_config(FAMILY / "sft_mixed.yaml", ["--ntp_data.path", str(paths["train"])])
    for document in read_all(config.ntp_data, dial_family.tokenizer()):
        at = document.answer_at
        text = (
            TOKENIZER.decode(document.token_ids[:at]),
            TOKENIZER.decode(document.token_ids[at:], skip_special_tokens=False),
        )
        assert text[0].endswith("it shows") and text[1].startswith(dial.OPEN)


@pytest.mark.parametrize(
    ("predicted", "verdict"),
    [
        ("it shows 7 .", 1),
        ("it shows 7 . that is odd .", 1),
        ("it shows 7", 1),
        ("it shows 8 .", 0),
        ("it shows", 0),
        ("", 0),
        ("7", 0),
        ('it shows 7", "reference": "', 0),
        ("Score: 1", 0),
    ],
)
def test_the_oracle_knows_what_follows(predicted, verdict):
    judge = Judge(dial_family.judge)
    assert asyncio.run(judge([(predicted, "it shows 7 . that is odd .")])) == [verdict]
    assert judge.counts["failed"] == 0


def test_a_judge_by_path_is_asked_and_counted(tmp_path):
    made = objective("rlpt_judge")
    position = Position("d", 1, ids("ann has 6 bob up1 ."), ids("it shows 7 . that is odd ."))
    other = Position("e", 1, ids("ann has 1 bob up1 ."), ids("it shows 2 . that is even ."))

    def thought(text: str) -> Thought:
        tokens = ids(f"hmm {dial.CLOSE} {dial_family.SAY} {text} {dial_family.SAID}")
        return Thought(tokens, (0.0,) * len(tokens), FinishReason.CLOSE, 0, 0, (2, len(tokens)))

    groups = [
        Group(str(i), p, made.prompt(p), (thought("it shows 7 ."), thought("it shows 2 ."), thought("it")), 0)
        for i, p in enumerate((position, other))
    ]
    assert asyncio.run(made.judged(None, groups)) == [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    notes = made.notes()
    assert notes["objective/judge_asked"] == 4 and notes["objective/judge_failed_frac"] == 0
    assert made.notes()["objective/judge_asked"] == 0  # since the last step


def test_bad_settings(tmp_path):
    with pytest.raises(ValueError, match="unknown mix 'c8': one of f1"):
        dial_family.write(tmp_path, mix="c8")
    for path in (
        "rlpretrain.corpora.dial_family:nothing",
        "nowhere:judge",
        "rlpretrain.corpora.dial_family:document",
    ):
        with pytest.raises(ValueError, match="objective.judge_function"):
            objective("rlpt_judge", judge_function=path)


def test_every_example_is_a_valid_configuration():
    found = sorted(FAMILY.glob("*.yaml"))
    assert len(found) >= 11
    for file in found:
        if "methods:" in file.read_text():
            assert load_experiment(file).methods
        else:
            config = load_config(file)
            assert Path(config.output_dir).name == file.stem
            json.dumps(config.objective)
