"""Issue 15.9: prompt and answer are what their two texts say one after the other, in every family of
tokenizers.
"""

from __future__ import annotations

import json

import pytest

from rlpretrain.config import DataConfig
from rlpretrain.data.stream import read_all
from tests.builders.tiny import word_tokenizer
from tests.builders.tokenizers_family import BYTES, FAMILIES, WITH_BOS, make

PAIRS = [
    ("2+2=", "4", ""),
    ("two and two is", "four", " "),
    ("two and two is ", "four", ""),
    ("two and two is", " four", ""),
    ("the answer", "is 42", "\n"),
    ("the question:", "\n the cat", "\n"),
    ("unk", "nown so", ""),
    ("so so", ", and the dog", ""),
    ("the cat sat on the mat.", "Then the dog came", " "),
    ("two (2", "+2) is 4", ""),
]
HARD = [("naïve caf", "é 漢", ""), ("漢", "字 so", ""), ("a 🙂", "🙂 b", ""), ("x\n\n", "\n\ny", "\n")]
"""For vocabularies that can write them."""


def read(tmp_path, tokenizer, prompt, answer, join, **more):
    (tmp_path / "d.jsonl").write_text(json.dumps({"q": prompt, "a": answer}) + "\n")
    data = DataConfig(path=str(tmp_path / "d.jsonl"), column="q", answer_column="a", answer_join=join, **more)
    return read_all(data, tokenizer)


def text_of(tokenizer, ids):
    return tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("streaming", [False, True])
def test_two_texts_say_what_they_say_one_after_the_other(family, streaming, tmp_path):
    tokenizer = make(family)
    for prompt, answer, join in PAIRS + (HARD if family in BYTES else []):
        (document,) = read(tmp_path, tokenizer, prompt, answer, join, streaming=streaming)
        ids, at = document.token_ids, document.answer_at
        both = prompt + join + answer
        assert text_of(tokenizer, ids) == text_of(tokenizer, tokenizer(both)["input_ids"])
        if family in BYTES:
            assert text_of(tokenizer, ids) == both
        assert ids[-1] == tokenizer.eos_token_id and ids.count(tokenizer.eos_token_id) == 1
        assert (ids[0] == tokenizer.bos_token_id) == (family in WITH_BOS) and ids.count(
            tokenizer.bos_token_id or -1
        ) <= 1
        # the prompt is what a model is asked with, and all that follows is the answer, without a space of its
        # own
        asked = tokenizer(prompt + join)["input_ids"]
        asked = asked[:-1] if asked[-1] == tokenizer.eos_token_id else asked
        assert list(ids[:at]) == asked, (prompt, answer)
        assert 0 < at < len(ids) - 1


@pytest.mark.parametrize("family", sorted(BYTES))
def test_the_target_of_a_sum_is_its_result(family, tmp_path):
    tokenizer = make(family)
    (document,) = read(tmp_path, tokenizer, "2+2=", "4", "")
    assert tokenizer.convert_ids_to_tokens(list(document.token_ids[document.answer_at : -1])) == ["4"]


@pytest.mark.parametrize("family", FAMILIES)
def test_blank_and_long_answers_are_left_out(family, tmp_path):
    tokenizer = make(family)
    rows = [("two", "four"), ("two", ""), ("", "four"), ("two " * 30, "four"), (None, "four"), ("two", None)]
    lines = [json.dumps({"q": q, "a": a}) + "\n" for q, a in rows]
    (tmp_path / "d.jsonl").write_text("".join(lines))
    data = DataConfig(path=str(tmp_path / "d.jsonl"), column="q", answer_column="a", max_length=20)
    assert [d.id for d in read_all(data, tokenizer)] == ["0"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_of_exactly_max_length_leaves_no_piece_of_special_tokens(family, tmp_path):
    """Issue 15.10: with a BOS, its end of text stood alone behind a BOS."""
    tokenizer = make(family)
    text = "ann has 2 apples and bob has 3 apples ."
    framed, plain = (tokenizer(text, add_special_tokens=special)["input_ids"] for special in (True, False))
    size = len(framed) - (framed[-1] == tokenizer.eos_token_id)
    (tmp_path / "d.txt").write_text(text + "\n")
    for length in range(2, size + 3):
        for append in (True, False):
            data = DataConfig(path=str(tmp_path / "d.txt"), max_length=length, append_eos=append)
            documents = read_all(data, tokenizer, min_length=1)
            kept = [[i for i in d.token_ids if i not in tokenizer.all_special_ids] for d in documents]
            assert all(kept) and sum(kept, []) == plain
            assert all(len(d.token_ids) <= length for d in documents)
    (whole,) = read_all(DataConfig(path=str(tmp_path / "d.txt"), max_length=size), tokenizer)
    assert len(whole.token_ids) == size and whole.id == "0"


def test_words_whose_compound_is_unknown_stay_two_words(tmp_path):
    """A vocabulary of words cannot write "sow1"; to read it as unknown would lose prompt and answer."""
    tokenizer = word_tokenizer(["what", "is", "so", "w1"])
    (document,) = read(tmp_path, tokenizer, "what is", "w1", " so")
    assert tokenizer.convert_ids_to_tokens(list(document.token_ids)) == ["what", "is", "so", "w1", "<eos>"]
    assert document.answer_at == 3
