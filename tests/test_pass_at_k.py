"""pass@k: the estimate over all subsets, and models whose chance of a right answer is known."""

from __future__ import annotations

import json
import math
from itertools import combinations, product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards.matching import final_answer
from rlpretrain.cli import main
from rlpretrain.config import ConfigError
from rlpretrain.evaluation.answers import AnswerRule, evaluate_answers
from rlpretrain.evaluation.pass_at_k import pass_at_k
from rlpretrain.prompts import ensure_delimiters
from rlpretrain.types import Document
from rlpretrain.verdict import Verdict
from rollout.types import FinishReason
from tests.builders.harness import WORDS, greedy, objective
from tests.builders.tiny import tiny_model, word_tokenizer


@pytest.mark.parametrize("n", [1, 2, 5, 6])
def test_it_is_the_share_of_sets_with_a_right_answer(n):
    for right in product([False, True], repeat=n):
        for k in range(1, n + 1):
            sets = list(combinations(right, k))
            expected = sum(map(any, sets)) / len(sets)
            assert pass_at_k(np.array([right]), k)[0] == pytest.approx(expected, abs=1e-12)


@settings(max_examples=50, deadline=None)
@given(st.floats(0, 1), st.integers(1, 8), st.integers(0, 6))
def test_it_has_no_bias(chance, k, more):
    """Its mean over all outcomes of n answers is the chance that one of k is right."""
    n = k + more
    counts = np.arange(n + 1)
    outcomes = np.arange(n) < counts[:, None]  # [n + 1, n]: c right answers
    weights = [math.comb(n, int(c)) * chance**c * (1 - chance) ** (n - c) for c in counts]
    mean = np.dot(weights, pass_at_k(outcomes, k))
    assert mean == pytest.approx(1 - (1 - chance) ** k, abs=1e-9)


def test_many_answers_do_not_overflow():
    """C(4000, 2000) is no float; the quotient of two such numbers is."""
    correct = np.arange(4000) < np.array([[0], [1], [3], [4000]])
    expected = [float(1 - math.comb(4000 - c, 2000) / math.comb(4000, 2000)) for c in (0,)] + [0.5]
    got = pass_at_k(correct, 2000)
    assert got[:2].tolist() == pytest.approx(expected) and got[3] == 1
    exact = 1 - (math.comb(3997, 2000) * 10**30 // math.comb(4000, 2000)) / 10**30
    assert got[2] == pytest.approx(exact, rel=1e-12)
    for k in (0, 4001):
        with pytest.raises(ValueError, match="answers for each position"):
            pass_at_k(correct, k)


@pytest.mark.parametrize(
    ("text", "opening", "closing", "answer"),
    [
        (" 42 ", "", "", "42"),
        ("a #### 1 b #### 2", "####", "", "2"),
        ("#### 2\nQ: 3", "####", "\n", "2"),
        ("\\boxed{\\frac{1}{2}} and so", "\\boxed{", "}", "\\frac{1}{2}"),
        ("\\boxed{4", "\\boxed{", "}", None),
        ("2", "####", "", None),
        ("2\nQ", "", "\n", "2"),
    ],
)
def test_the_part_of_an_answer_that_counts(text, opening, closing, answer):
    assert final_answer(text, opening, closing) == answer


def test_a_true_answer_needs_no_marker():
    box = AnswerRule("\\boxed{", "}")
    assert box.is_right("so \\boxed{ 4 }", "4") and not box.is_right("4", "4")
    assert not box.is_right("\\boxed{5}", "4")


# models with known answers


@pytest.fixture(scope="module")
def tokenizer():
    made = word_tokenizer(WORDS)
    ensure_delimiters(made)
    return made


def markov(tokenizer, chances: dict[str, dict[str, float]]):
    """A llama without attention whose next token depends on the last alone: `chances[last][next]`.

    With its layers switched off, logits are head @ norm(embedding): one-hot embeddings choose a column.
    """
    size = len(tokenizer)
    model = tiny_model(
        "llama",
        vocab_size=size,
        hidden_size=size + size % 2,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=32,
    )
    width = model.config.hidden_size
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size, width))
        head = torch.full((size, width), -30.0)
        vocabulary = tokenizer.get_vocab()
        for last, of_last in chances.items():
            for token, chance in of_last.items():
                head[vocabulary[token], vocabulary[last]] = math.log(chance)
        model.lm_head.weight.copy_(head / math.sqrt(width))  # the norm of a one-hot vector is sqrt(width)
    return model


def documents_of(tokenizer, count: int) -> list[Document]:
    """ "Q the A" is answered by "4 end", and an end of text."""
    prompt, answer = tokenizer("Q the A")["input_ids"], tokenizer("4 end")["input_ids"]
    ids = (*prompt, *answer, tokenizer.eos_token_id)
    return [Document(str(number), ids, answer_at=3) for number in range(count)]


def made_objective(tokenizer, **fields):
    made = objective(tokenizer, **fields)
    from dataclasses import replace

    params = replace(made.setting.params, eos_ids=(tokenizer.eos_token_id,))
    return made.with_setting(replace(made.setting, params=params))


SURE = {"4": {"end": 1.0}, "5": {"end": 1.0}, "end": {"<eos>": 1.0}}


def test_a_model_that_is_always_right(tokenizer):
    """Directly it says 4; after its thought it says 5."""
    chances = SURE | {
        "A": {"4": 1.0},
        "<think>": {"up": 1.0},
        "up": {"</think>": 1.0},
        "</think>": {"5": 1.0},
    }
    model, documents = markov(tokenizer, chances), documents_of(tokenizer, 9)
    made = made_objective(tokenizer)
    direct = evaluate_answers(model, made, documents, thinking=False, n=4, ks=(1, 4))
    thinking = evaluate_answers(model, made, documents, thinking=True, n=4, ks=(1, 4))
    assert direct.correct.all() and not thinking.correct.any()
    assert set(direct.texts[0]) == {" 4 end"} and set(thinking.texts[0]) == {" 5 end"}
    assert direct.summary() == {
        "pass@1": 1,
        "pass@1_ci": [1, 1],
        "pass@4": 1,
        "pass@4_ci": [1, 1],
        "unfinished": 0,
    }
    assert thinking.summary()["length"] == 2 and thinking.summary()["unclosed"] == 0
    assert thinking.minus(direct, 1) == [-1, -1, -1]


def test_a_model_that_is_right_with_a_known_probability(tokenizer):
    """Directly a third of the answers is right; after its thought three quarters are."""
    chances = SURE | {
        "A": {"4": 1 / 3, "5": 2 / 3},
        "<think>": {"up": 1.0},
        "up": {"</think>": 0.5, "up": 0.5},
    }
    chances |= {"</think>": {"4": 0.75, "5": 0.25}}
    model, documents = markov(tokenizer, chances), documents_of(tokenizer, 120)
    made = made_objective(tokenizer, thought_tokens=30)
    direct, thinking = (
        evaluate_answers(model, made, documents, thinking=way, n=8, ks=(1, 2, 4)) for way in (False, True)
    )
    for answers, chance in ((direct, 1 / 3), (thinking, 3 / 4)):
        found = answers.summary()
        for k in (1, 2, 4):
            low, high = found[f"pass@{k}_ci"]
            assert found[f"pass@{k}"] == pytest.approx(1 - (1 - chance) ** k, abs=0.06)
            assert low - 0.02 < 1 - (1 - chance) ** k < high + 0.02 and high - low < 0.15
    mean, low, high = thinking.minus(direct, 1)
    assert low < 5 / 12 < high and mean == pytest.approx(thinking.correct.mean() - direct.correct.mean())
    likeliest = evaluate_answers(
        model, made, documents[:9], thinking=False, n=2, ks=(1,), answer_temperature=0
    )
    assert not likeliest.correct.any()
    assert evaluate_answers(
        model, made, documents[:9], thinking=True, n=2, ks=(1,), answer_temperature=0
    ).correct.all()


def test_answers_depend_on_seed_and_document_alone(tokenizer):
    chances = SURE | {"A": {"4": 0.5, "5": 0.5}}
    model, documents = markov(tokenizer, chances), documents_of(tokenizer, 20)
    calls = []
    made = made_objective(tokenizer)
    whole = evaluate_answers(model, made, documents, thinking=False, n=8, progress=lambda *c: calls.append(c))
    part = evaluate_answers(model, made, documents[7:12], thinking=False, n=8)
    other = evaluate_answers(model, made, documents, thinking=False, n=8, seed=1)
    assert (whole.correct[7:12] == part.correct).all() and (whole.correct != other.correct).any()
    assert calls == [(8, 20), (16, 20), (20, 20)]
    with pytest.raises(ValueError, match="the same documents"):
        whole.minus(part, 1)


def test_answers_follow_thoughts_that_were_closed(tokenizer):
    """The likeliest answer, token by token, after prompt, thought and close tag of a random model."""
    model = tiny_model("llama", vocab_size=len(tokenizer), seed=5)
    made = made_objective(tokenizer)
    answers = evaluate_answers(
        model,
        made,
        documents_of(tokenizer, 6),
        thinking=True,
        n=3,
        ks=(1,),
        max_answer_tokens=3,
        answer_temperature=0,
        rule=AnswerRule(stop="end"),
    )
    reasons = set()
    for texts, group in zip(answers.texts, answers.groups, strict=True):
        for text, thought in zip(texts, group.thoughts, strict=True):
            reasons.add(thought.finish_reason)
            close = () if thought.finish_reason is FinishReason.CLOSE else group.prompt.close_ids
            ids = (*group.prompt.token_ids, *thought.token_ids, *close)
            assert text.split() == greedy(model, tokenizer, ids, 3, special=True).split()
    assert {FinishReason.CLOSE, FinishReason.LENGTH} <= reasons


def odd_ups(question: str, trace: str, answer: str) -> Verdict:
    """A verifier that wants an odd number of `up` before the answer 4."""
    if question.split() != ["Q", "the", "A"]:
        raise ValueError("that is no question")
    ups, right = trace.split().count("up"), answer.split()[:1] == ["4"]
    return Verdict(process=1 / (1 + ups), answer_right=right, verified=right and ups % 2 == 1)


def test_verdicts_on_thoughts_and_answers_together(tokenizer):
    """verified@k over all sets of k thoughts; a thought that did not close itself is wrong."""
    chances = SURE | {"<think>": {"up": 1.0}, "up": {"</think>": 0.4, "up": 0.6}}
    chances |= {"</think>": {"4": 0.75, "5": 0.25}, "A": {"4": 1.0}}
    model, documents = markov(tokenizer, chances), documents_of(tokenizer, 12)
    made = made_objective(tokenizer, thought_tokens=3)
    ways = {"n": 5, "ks": (1, 2, 5), "verifier": odd_ups}
    assert evaluate_answers(model, made, documents, thinking=False, **ways).verdicts is None
    answers = evaluate_answers(model, made, documents, thinking=True, **ways)
    right, shares = [], []
    for texts, group in zip(answers.texts, answers.groups, strict=True):
        for text, thought in zip(texts, group.thoughts, strict=True):
            ups = len(thought.token_ids) - 1
            closed = thought.finish_reason is FinishReason.CLOSE
            right.append(closed and ups % 2 == 1 and text.split()[0] == "4")
            shares.append(closed / (1 + ups))
    by_position = np.array(right).reshape(12, 5)
    found = answers.summary()
    for k in (1, 2, 5):
        sets = [any(chosen) for row in by_position.tolist() for chosen in combinations(row, k)]
        assert found[f"verified@{k}"] == pytest.approx(np.mean(sets))
    assert 0 < found["verified@1"] < found["pass@1"] and found["process"] == pytest.approx(np.mean(shares))
    part = answers.where([number % 3 == 0 for number in range(12)])
    assert part.summary()["verified@1"] == pytest.approx(by_position[::3].mean()) and len(part.groups) == 4
    other = [Document("1", tokenizer("Q 4 the A 4")["input_ids"], answer_at=4)]
    with pytest.raises(ConfigError, match="cannot read the question of document 1.*that is no question"):
        evaluate_answers(model, made, other, thinking=True, **ways)


def test_errors(tokenizer):
    model, made = tiny_model("llama", vocab_size=len(tokenizer)), made_objective(tokenizer)
    documents = documents_of(tokenizer, 2)
    with pytest.raises(ConfigError, match="has no answer: set data.answer_column"):
        evaluate_answers(model, made, [Document("1", (3, 4, 5))], thinking=False)
    with pytest.raises(ConfigError, match=r"for k in \[1, 9\] needs at least as many answers: 4"):
        evaluate_answers(model, made, documents, thinking=False, n=4, ks=(9, 1))
    with pytest.raises(ConfigError, match="256 positions.*thoughts of up to 8 and answers of up to 250"):
        evaluate_answers(model, made, documents, thinking=True, max_answer_tokens=250)


def test_the_command_prints_both_ways_beside_the_base(tokenizer, tmp_path, capsys):
    chances = SURE | {"A": {"4": 0.5, "5": 0.5}, "<think>": {"</think>": 1.0}, "</think>": {"4": 1.0}}
    for name, of_model in (("model", chances), ("base", chances | {"</think>": {"5": 1.0}})):
        markov(tokenizer, of_model).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    rows = [{"text": "Q the A", "answer": "4 end", "n": n % 2} for n in range(16)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [
        "eval",
        str(tmp_path / "model"),
        "--data",
        str(tmp_path / "d.jsonl"),
        "--answer-column",
        "answer",
    ]
    words += ["--answer-join", " ", "--objective", "{name: rlp, positions: answer}", "--device", "cpu"]
    words += ["--pass-at", "1,2", "--answers", "4", "--max-thought-tokens", "8", "--answer-after", "4"]
    words += ["--frozen", str(tmp_path / "base"), "--json", str(tmp_path / "out.json")]
    words += ["--verifier", "tests.test_pass_at_k:odd_ups", "--by", "n"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert (
        "16 prompts, 4 answers each" in printed and "base: after a thought" in printed and "gain" in printed
    )
    found = json.loads((tmp_path / "out.json").read_text())["pass_at"]
    assert found["thinking"]["pass@1"] == 1 and found["base thinking"]["pass@1"] == 0
    assert found["thinking"]["verified@2"] == 0 and found["thinking"]["process"] == 1
    assert "verified@1" in printed and "by n" in printed and found["by"].keys() == {"0", "1"}
    halves = [found["by"][value]["direct"]["pass@1"] for value in "01"]
    assert sum(halves) / 2 == pytest.approx(found["direct"]["pass@1"])
    assert found["thinking - base"]["pass@2"] == [1, 1, 1]
    assert found["direct - base"]["pass@1"][0] == 0  # the same seeds
    assert 0.2 < found["direct"]["pass@1"] < 0.8
    for missing in (["--pass-at", "1"], ["--pass-at", "1", "--tasks", "a"]):
        assert main(["eval", str(tmp_path / "model"), *missing]) == 2
        assert "give --data FILE" in capsys.readouterr().err
    assert main([*words[:4], "--pass-at", "1"]) == 2 and "set --answer-column" in capsys.readouterr().err
