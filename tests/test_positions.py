"""Positions: in range, distinct, sorted, deterministic; markers where a reader would see them."""

import sys
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlpretrain.config import ConfigError
from rlpretrain.data.positions import KINDS, PositionPicker
from rlpretrain.types import Document
from tests.builders.tiny import EOS, bpe_tokenizer, word_tokenizer

TEXT = "ann has 6 bob up3 cat times3 shows 7 . this is it . so 9 is Answer : 42"
WORD = word_tokenizer(TEXT.split())
LINES = [
    "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n#### 72",
    "The answer is 72. This is it! Is it? naïve café 漢字 answer: 42",
]
BPE = bpe_tokenizer(LINES, 420)


def metaspace_tokenizer():
    """Spaces belong to the following piece and vanish at the start of what is decoded, as in Llama 2."""
    words = ["▁The", "▁answer", "▁is", "▁", "7", "2", ".", "▁This", "▁it"]
    vocab = {w: i for i, w in enumerate(["<unk>", *words, *{c for w in words for c in w if c not in "▁72."}])}
    merges = []
    for w in words:
        for k in range(2, len(w) + 1):
            vocab.setdefault(w[:k], len(vocab))
            if (pair := (w[: k - 1], w[k - 1])) not in merges:
                merges.append(pair)
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


META = metaspace_tokenizer()


def document(text, tokenizer, eos=True):
    end = [tokenizer.eos_token_id] if eos else []
    return Document("d", (*tokenizer(text)["input_ids"], *end), "d.txt:1")


def rng(seed=0):
    return np.random.default_rng(seed)


def rest(kind, text, tokenizer, **settings):
    """What stands from each picked position on."""
    doc = document(text, tokenizer, eos=False)
    picked = PositionPicker(kind, tokenizer, per_document=None, **settings)(doc, rng())
    return [tokenizer.decode(doc.token_ids[i:]).strip() for i in picked]


# Every kind


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from([*(k for k in KINDS if k != "answer"), "function"]),
    length=st.integers(0, 40),
    per_document=st.none() | st.integers(1, 5),
    target_length=st.integers(1, 6),
    min_context=st.integers(1, 12),
    every=st.integers(1, 7),
    top_fraction=st.floats(0, 1),
    seed=st.integers(0, 2**32),
)
def test_positions_are_valid_and_deterministic(
    kind, length, per_document, target_length, min_context, every, top_fraction, seed
):
    words = rng(seed).choice(TEXT.split(), size=length)
    doc = document(" ".join(words), WORD)
    entropies = [float("nan"), *rng(seed).random(len(doc.token_ids) - 1)]
    picker = PositionPicker(
        (lambda d, _: list(range(len(d.token_ids)))) if kind == "function" else kind,
        WORD,
        per_document=per_document,
        target_length=target_length,
        min_context=min_context,
        marker="is",
        every=every,
        top_fraction=top_fraction,
    )
    picked = picker(doc, rng(seed), entropies)
    assert picked == picker(doc, rng(seed), entropies)
    assert picked == sorted(set(picked)) and all(type(i) is int for i in picked)
    assert per_document is None or len(picked) <= per_document
    for i in picked:
        assert min_context <= i <= len(doc.token_ids) - target_length
        assert kind == "function" or doc.token_ids[i] != WORD.eos_token_id
        assert kind != "before" or WORD.decode([doc.token_ids[i]]) == "is"
        assert kind != "after" or WORD.decode([doc.token_ids[i - 1]]) == "is"
        assert kind != "every_k" or (i - min_context) % every == 0
    if kind == "random" and len(doc.token_ids) - 1 >= min_context + target_length:
        assert picked  # there is a place


def test_random_is_uniform():
    doc = document(TEXT, WORD)
    picker, generator = PositionPicker("random", WORD, min_context=2), rng()
    counts = np.bincount([picker(doc, generator)[0] for _ in range(4000)], minlength=len(doc.token_ids))
    assert counts[:2].sum() == 0 and counts[-1] == 0  # no context; the end of text
    assert abs(counts[2:-1] / 4000 - 1 / (len(doc.token_ids) - 3)).max() < 0.015


def test_document_end():
    doc = document("ann has 6", WORD)  # and eos
    assert PositionPicker("random", WORD, per_document=None, target_length=2)(doc, rng()) == [
        1,
        2,
    ]  # may end with eos
    assert PositionPicker("random", WORD, per_document=None, target_length=4)(doc, rng()) == []
    assert PositionPicker("random", WORD)(document("", WORD), rng()) == []


def test_eos_is_a_target_only_when_asked_for():
    doc = document("ann has 6", WORD)
    assert PositionPicker("every_k", WORD, per_document=None, every=1)(doc, rng()) == [1, 2]
    assert PositionPicker("before", WORD, marker=EOS)(doc, rng()) == [3]
    assert PositionPicker(lambda *_: [3], WORD)(doc, rng()) == [3]


def test_every_k_from_the_minimum_context():
    doc = document(TEXT, WORD)
    assert PositionPicker("every_k", WORD, per_document=None, min_context=3, every=5)(doc, rng()) == [
        3,
        8,
        13,
        18,
    ]
    some = PositionPicker("every_k", WORD, per_document=2, min_context=3, every=5)(doc, rng())
    assert len(some) == 2 and set(some) <= {3, 8, 13, 18}


def test_entropy_takes_the_top_or_samples_among_it():
    doc = document(TEXT, WORD)
    n = len(doc.token_ids)
    entropies = np.arange(n, dtype=float)
    entropies[5] = 100
    top = PositionPicker("entropy", WORD, per_document=2, top_fraction=0)
    assert top(doc, rng(), entropies) == [5, n - 2]
    among = PositionPicker("entropy", WORD, top_fraction=0.5)
    seen = {among(doc, rng(seed), entropies)[0] for seed in range(200)}
    assert seen == {5, *range(n - 10, n - 1)}  # half of 19 candidates, rounded up
    torch_like = __import__("torch").tensor(entropies)
    assert top(doc, rng(), torch_like) == [5, n - 2]


def test_entropy_needs_one_value_a_token():
    doc = document(TEXT, WORD)
    with pytest.raises(ValueError, match="need the entropies"):
        PositionPicker("entropy", WORD)(doc, rng())
    with pytest.raises(ValueError, match=r"document d has 21 tokens, its entropies have shape \(3,\)"):
        PositionPicker("entropy", WORD)(doc, rng(), [1.0, 2.0, 3.0])


# Markers and sentences


@pytest.mark.parametrize(
    ("kind", "marker", "expected"),
    [
        ("before", "shows", ["shows 7 ."]),
        ("after", "shows", ["7 ."]),
        ("after", "has 6", ["bob shows 7 ."]),
        ("after", " has  6 ", ["bob shows 7 ."]),
        ("before", "ha", None),  # no such word
        ("after", "7 .", []),  # nothing follows
    ],
)
def test_markers_of_whole_words(kind, marker, expected):
    if expected is None:
        with pytest.raises(ConfigError, match="cannot write the marker 'ha'"):
            PositionPicker(kind, WORD, marker=marker)
    else:
        assert rest(kind, "ann has 6 bob shows 7 .", WORD, marker=marker) == expected


@pytest.mark.parametrize(
    ("kind", "marker", "expected"),
    [
        ("after", "####", ["72"]),
        ("after", "\n#### ", ["72"]),
        ("before", "####", ["#### 72"]),
        ("after", "clips in", ["May.\n#### 72"]),
        ("after", "<<", ["48/2=24>>24 clips in May.\n#### 72"]),
        ("before", "May", ["May.\n#### 72"]),
        ("before", "ay", []),  # inside a word
        ("before", "clips\nin", ["clips in May.\n#### 72"]),
    ],
)
def test_markers_in_byte_level_tokens(kind, marker, expected):
    assert rest(kind, LINES[0], BPE, marker=marker) == expected


def test_markers_are_whole_words_and_found_everywhere():
    text = "this is it; is it? thesis is"
    assert rest("before", text, BPE, marker="is") == ["is it; is it? thesis is", "is it? thesis is", "is"]
    assert rest("after", text, BPE, marker="is") == ["it; is it? thesis is", "it? thesis is"]


def test_marker_in_pieces_that_lose_their_space():
    text = "The answer is 72. This is it."
    assert META.decode([META("answer")["input_ids"][0]]) == "answer"  # alone, without its space
    assert rest("after", text, META, marker="answer is") == ["72. This is it."]
    assert rest("before", text, META, marker="is") == ["is 72. This is it.", "is it."]
    assert rest("sentence", text, META) == ["This is it."]


def test_marker_whose_words_and_signs_are_apart_in_the_tokenizer():
    split = word_tokenizer(["Answer", ":", "42"])
    split.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    assert split.decode(split("Answer: 42")["input_ids"]) == "Answer : 42"
    assert rest("after", "42 Answer: 42", split, marker="Answer:") == ["42"]


def test_marker_of_a_tokenizer_that_lowers_case():
    lower = word_tokenizer(["the", "answer", "42"])
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert rest("after", "The Answer 42", lower, marker="The Answer") == ["42"]


def test_characters_split_into_bytes():
    text = "café 漢字 is naïve. ω is it. 漢字。x"
    doc = document(text, BPE, eos=False)
    assert any(BPE.decode([t]) == "\ufffd" for t in doc.token_ids)
    assert rest("after", text, BPE, marker="漢字") == ["is naïve. ω is it. 漢字。x", "。x"]
    assert rest("before", text, BPE, marker="ω")[0] == "ω is it. 漢字。x"
    assert rest("sentence", text, BPE) == ["ω is it. 漢字。x", "漢字。x", "x"]


def test_sentences():
    assert rest("sentence", TEXT, WORD) == ["this is it . so 9 is Answer : 42", "so 9 is Answer : 42"]
    text = 'It is 3.5 in "May." Is it?\n\nNo!  (This) is it'
    assert rest("sentence", text, BPE) == ["Is it?\n\nNo!  (This) is it", "No!  (This) is it", "(This) is it"]


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="ab .!?\n漢é", max_size=30))
def test_token_text_is_the_decoded_text(text):
    ids = BPE(text)["input_ids"]
    found, starts = PositionPicker("random", BPE).text(ids)
    assert found == text and len(starts) == len(ids) and starts == sorted(starts)


# Functions


def halves(document, generator):
    return [len(document.token_ids) // 2, np.int64(1), 1]


def test_function_itself_or_by_path(monkeypatch):
    module = types.ModuleType("their_positions")
    module.halves, module.number = halves, 3
    monkeypatch.setitem(sys.modules, "their_positions", module)
    doc = document(TEXT, WORD)
    for kind in (halves, "their_positions:halves"):
        assert PositionPicker(kind, WORD, per_document=None)(doc, rng()) == [1, len(doc.token_ids) // 2]
        assert PositionPicker(kind, WORD, per_document=None, min_context=4)(doc, rng()) == [
            len(doc.token_ids) // 2
        ]
    for path, said in {
        "their_positions:thirds": "cannot be imported.*thirds",
        "no_such_module:f": "cannot be imported.*no_such_module",
        "their_positions:number": "is a int, not a function",
    }.items():
        with pytest.raises(ConfigError, match=said):
            PositionPicker(path, WORD)


@pytest.mark.parametrize("bad", [21, -1, 1.5, True])
def test_function_that_leaves_the_document(bad):
    with pytest.raises(
        ValueError, match=rf"gave {bad}, which is no index of document d \(d.txt:1\) of 21 tokens"
    ):
        PositionPicker(lambda *_: [2, bad], WORD)(document(TEXT, WORD), rng())


# What is refused


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kind": "entrpy"}, "no positions 'entrpy': did you mean 'entropy'"),
        ({"kind": "xyz"}, "there are random, every_k"),
        ({"kind": "before"}, "positions 'before' need a marker"),
        ({"kind": "after", "marker": "  "}, "positions 'after' need a marker"),
        ({"target_length": 0}, "target_length must be at least 1, got 0"),
        ({"min_context": 0}, "min_context must be at least 1, got 0"),
        ({"every": 0}, "every must be at least 1"),
        ({"per_document": 0}, "positions per document must be at least 1"),
        ({"top_fraction": 1.5}, "top_fraction must lie between 0 and 1"),
    ],
)
def test_refused_settings(settings, said):
    with pytest.raises(ConfigError, match=said):
        PositionPicker(settings.pop("kind", "random"), WORD, **settings)
