"""The dial corpus: its answers are true, its traces verify, its shares are what they say."""

from __future__ import annotations

import json
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlpretrain.corpora import dial
from tests.builders.dial import PROBLEMS, SIGN, compute


def verified(trace: list[str]) -> bool:
    """Whether every step of `6 bob up3 9 ...` follows from the one before."""
    values, ops = [int(w) for w in trace[::3]], trace[2::3]
    return all(
        SIGN[op[:-1]](a, int(op[-1])) % 10 == b for a, op, b in zip(values, ops, values[1:], strict=False)
    )


@given(PROBLEMS)
def test_answers_are_true_and_traces_verify(problem):
    trace = problem.trace()
    assert compute(problem.question()) == problem.answer == int(trace[-1])
    assert verified(trace) and len(trace) == 3 * problem.depth + 1
    assert dial.verify(" ".join(trace), " ".join([*trace, dial.CLOSE])) == (True, 1.0)
    names = [w for w in problem.question() if w in dial.NAMES]
    assert len(names) == problem.depth + 1
    assert all(
        (dial.NAMES.index(a) + 1) % 12 == dial.NAMES.index(b) for a, b in zip(names, names[1:], strict=False)
    )


@given(PROBLEMS, st.integers(0, 2**32), st.floats(0, 1))
def test_a_slip_changes_the_trace_and_never_its_form(problem, seed, slip):
    trace = problem.trace(random.Random(seed), slip)
    assert len(trace) == 3 * problem.depth + 1 and set(trace) <= set(dial.WORDS)
    assert [w for w in trace if w in dial.NAMES] == [w for w in problem.question()[1:] if w in dial.NAMES]


@given(PROBLEMS, st.integers(0, 2**32))
def test_without_slips_the_generator_does_not_matter(problem, seed):
    assert problem.trace(random.Random(seed), 0.0) == problem.trace()


@given(PROBLEMS, st.data())
def test_verify_gives_the_share_before_the_first_error(problem, data):
    trace = problem.trace()
    at = data.draw(st.integers(0, len(trace) - 1))
    exact, share = dial.verify(" ".join(trace), " ".join([*trace[:at], "hmm", *trace[at + 1 :]]))
    assert not exact and share == at / len(trace)
    assert dial.verify(" ".join(trace), "")[1] == 0.0
    longer = dial.verify(" ".join(trace), " ".join([*trace, "so"]))
    assert longer == (False, 1.0)


@given(PROBLEMS, st.integers(0, 2**32))
def test_a_record_can_be_checked(problem, seed):
    record = dial.record(problem)
    words = record["text"].split()
    assert (
        words[-3] == "shows"
        and words[-2] == record["answer"] == str(compute(words[:-3]))
        and words[-1] == "."
    )
    assert record["depth"] == problem.depth and dial.verify(record["trace"], record["trace"])[0]


@given(st.integers(0, 2**32), st.sampled_from(sorted(dial.MIXES)))
def test_answers_stay_true_beside_slipping_thoughts(seed, mix):
    rng = random.Random(seed)
    for kind in ("think", "plain"):
        words = dial.FORMATS[kind](rng, dial.MIXES[mix])
        question = words[: words.index("shows")]
        assert words[-1] == "." and int(words[-2]) == compute(question)


def kind_of(text: str) -> str:
    words = text.split()
    if dial.OPEN in words:
        return "think"
    if "shows" in words:
        return "plain"
    if "has" not in words:
        return "prose"
    return "worked" if "so" in words else "chain"


@pytest.mark.parametrize("name", dial.MIXES)
def test_shares_are_those_of_the_mix(name):
    mix, n = dial.MIXES[name], 6000
    assert sum(getattr(mix, kind) for kind in dial.FORMATS) == pytest.approx(1.0)
    texts = list(dial.base_documents(n, 1, mix))
    found = Counter(map(kind_of, texts))
    for kind in dial.FORMATS:
        assert found[kind] / n == pytest.approx(getattr(mix, kind), abs=0.025), kind
    thoughts = [
        (
            t.split()[: t.split().index("shows")],
            t.split(f"{dial.OPEN} ")[1].split(f" {dial.CLOSE}")[0].split(),
        )
        for t in texts
        if dial.OPEN in t
    ]
    worked_out = [(q, t) for q, t in thoughts if t[0].isdigit()]
    assert len(worked_out) / len(thoughts) == pytest.approx(mix.full_trace + mix.part_trace, abs=0.05)
    full = [t for q, t in worked_out if len(t) == 3 * ((len(q) - 3) // 2) + 1]
    assert len(full) / len(thoughts) == pytest.approx(mix.full_trace, abs=0.05)
    steps = sum((len(t) - 1) // 3 for t in full)
    wrong = sum(not verified(t[i : i + 4]) for t in full for i in range(0, len(t) - 1, 3))
    assert 0 < wrong / steps < mix.slip * 1.3  # a slipped operation is carried out, so not every slip shows
    depths = {
        d
        for low, high in [mix.think_depths, *([mix.deep_depths] if mix.deep else [])]
        for d in range(low, high + 1)
    }
    assert {(len(q) - 3) // 2 for q, _ in thoughts} == depths


def test_everything_is_deterministic_under_the_seed(tmp_path):
    def made(folder, seed):
        return {
            n: p.read_text()
            for n, p in dial.write(tmp_path / folder, base=40, train=40, held_out=12, seed=seed).items()
            if p.is_file()
        }

    first = made("a", 3)
    assert set(first) == {"base", "train", "held_out"}
    assert first == made("b", 3)
    assert all(first[name] != text for name, text in made("c", 4).items())


def test_held_out_problems_are_not_trained_on(tmp_path):
    paths = dial.write(
        tmp_path, base=1, train=4000, held_out=3000, seed=0, depths=(1, 2, 3), held_out_depths=(1, 2, 3)
    )
    train, held_out = (
        [json.loads(x) for x in paths[n].read_text().splitlines()] for n in ("train", "held_out")
    )
    deep = {row["text"] for row in held_out if row["depth"] > 2}
    assert len(held_out) == 3000 and deep and not deep & {row["text"] for row in train}
    assert 3500 < len(train) < 4000  # those that were in both are left out


def test_each_depth_is_equally_common():
    found = Counter(p.depth for p in dial.problems(60, 0, (1, 2, 5), "train"))
    assert found == {1: 20, 2: 20, 5: 20}
    assert [*dial.problems(9, 0, (1, 2), "train")] != [*dial.problems(9, 0, (1, 2), "held_out")]


def test_the_tokenizer_knows_every_word():
    tokenizer = dial.tokenizer()
    for text in (
        *dial.base_documents(300, 0, dial.MIXES["b9"]),
        *dial.base_documents(300, 0, dial.MIXES["d1"]),
    ):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.unk_token_id not in ids and len(ids) == len(text.split())
        assert tokenizer.decode(ids) == text
    assert tokenizer("nonsense")["input_ids"] == [tokenizer.unk_token_id]
    assert tokenizer.convert_tokens_to_ids([dial.OPEN, dial.CLOSE, dial.EOS]) == [3, 4, 1]


def test_an_unknown_mix_names_those_there_are(tmp_path):
    with pytest.raises(ValueError, match="unknown mix 'b8': one of b9, d1"):
        dial.write(tmp_path, mix="b8")


def test_trace_skill_of_a_model_that_knows_and_one_that_does_not(corpus):
    from transformers import AutoModelForCausalLM

    tokenizer = dial.tokenizer()
    assert dial.trace_skill(AutoModelForCausalLM.from_pretrained(corpus / "base"), tokenizer, count=40) < 0.3

    class Knows:
        """Says the token that really follows, by looking."""

        def parameters(self):
            import torch

            return iter([torch.zeros(1)])

        def __call__(self, input_ids):
            import types

            import torch

            following = torch.roll(input_ids[0], -1)
            return types.SimpleNamespace(
                logits=torch.nn.functional.one_hot(following, len(tokenizer)).float()[None]
            )

    assert dial.trace_skill(Knows(), tokenizer, count=40) == 1.0

    class ForgetsTheStart(Knows):
        """Knows everything but the digit that a trace begins with, and would rather not begin one."""

        def __call__(self, input_ids):
            out = super().__call__(input_ids)
            at = input_ids[0].tolist().index(tokenizer.convert_tokens_to_ids(dial.OPEN))
            out.logits[0, at] = 0.0
            out.logits[0, at, tokenizer.convert_tokens_to_ids(["hmm", "0"])] = 1.0
            return out

    skill = dial.trace_skill(ForgetsTheStart(), tokenizer, count=400)
    assert skill == sum(p.start == 0 for p in dial.problems(400, 0, range(1, 5), "skill")) / 400 < 0.2
