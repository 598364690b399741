"""Scores of texts: every token belongs to one segment, whatever the tokenizer, however a text is split."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from rlpretrain.config import ConfigError, DataConfig
from rlpretrain.config.io import build
from rlpretrain.data.scores import SEGMENT_STARTS
from rlpretrain.data.stream import DocumentStream
from rlpretrain.data.token_text import TokenReader
from rlpretrain.data.tokenization import DocumentSplitter
from rollout.store import document_from_row, document_to_row
from tests.builders.tiny import bpe_tokenizer, word_tokenizer

CHARACTERS = "ab z.\n\t\u00a0éß漢字🙂\u0301"
BYTES = bpe_tokenizer(["ab ab. zé zé 漢字 ab"] * 9, 280)
WORDS = word_tokenizer(["a", "b", "z", "ab", "a."])


@st.composite
def scored(draw: Any) -> tuple[str, list[list[float]]]:
    """A text that is not blank, and segments with gaps; the score of segment k is k."""
    text = draw(st.text(CHARACTERS, min_size=1, max_size=40).filter(lambda t: not t.isspace()))
    cuts = sorted(draw(st.sets(st.integers(0, len(text)), min_size=2, max_size=8)))
    if len(cuts) < 2:
        cuts = [0, len(text)]
    spans = list(zip(cuts, cuts[1:], strict=False))
    kept = [span for span in spans if draw(st.booleans())] or spans[:1]
    return text, [[start, end, float(k)] for k, (start, end) in enumerate(kept)]


def pieces_of(tokenizer: Any, text: str, value: Any, **settings: Any) -> list[Any]:
    data = DataConfig(**{"path": "x", "score_column": "s", "max_length": 999, **settings})
    (pieces,) = DocumentSplitter(data, tokenizer, 2).split({"text": [text], "s": [value]}, [0])
    return pieces


def owner(character: int, spans: list[list[float]]) -> float:
    """The score of a character: of its segment, else of the next one, else of the last."""
    return next((score for _, end, score in spans if character < end), spans[-1][2])


@settings(max_examples=150, deadline=None)
@given(scored())
def test_every_token_has_the_score_of_its_first_character(given):
    """Against the bytes of a byte-level vocabulary: a character may be spread over several tokens."""
    text, spans = given
    (piece,) = pieces_of(BYTES, text, spans)
    of_byte = [i for i, character in enumerate(text) for _ in character.encode()]
    at = 0
    for token, score in zip(TokenReader(BYTES).raw(piece.token_ids[:-1]), piece.scores, strict=False):
        inside = of_byte[at : at + len(token)]
        visible = [i for i in inside if not text[i].isspace()] or inside
        assert score == owner(visible[0], spans)
        at += len(token)
    assert at == len(of_byte) and piece.scores[-1] == piece.scores[-2]  # the end-of-text token
    assert len(piece.scores) == len(piece.token_ids) and piece.scores == sorted(piece.scores)
    changes = [i for i in range(1, len(piece.scores)) if piece.scores[i] != piece.scores[i - 1]]
    assert piece.segment_starts == [0, *changes]


@settings(max_examples=60, deadline=None)
@given(scored(), st.integers(3, 9))
def test_pieces_of_a_split_text_have_the_scores_of_the_whole(given, most):
    text, spans = given
    (whole,) = pieces_of(BYTES, text, spans)
    pieces = pieces_of(BYTES, text, spans, max_length=most)
    ids = [i for piece in pieces for i in piece.token_ids]
    assert [s for piece in pieces for s in piece.scores] == whole.scores[: len(ids)]
    assert ids == whole.token_ids[: len(ids)] and all(piece.segment_starts[0] == 0 for piece in pieces)


def test_special_tokens_at_the_beginning_of_each_piece():
    tokenizer = bpe_tokenizer(["a b"], 260)
    bos = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(f"{bos} $A", None, [(bos, 1)])
    pieces = pieces_of(tokenizer, "abcdef", [[0, 2, 0.0], [2, 6, 1.0]], max_length=4)
    assert [len(piece.token_ids) for piece in pieces] == [4, 4]
    assert [piece.scores for piece in pieces] == [[0, 0, 0, 1], [1, 1, 1, 1]]
    assert pieces[0].segment_starts == [0, 3] and pieces[1].segment_starts == [0]


def test_white_space_does_not_decide_and_equal_scores_stay_two_segments():
    """Segments that end, or begin, with the space between two words; a word tokenizer and one of bytes."""
    joined = bpe_tokenizer(["a b b b"] * 9, 259)  # " b" is one token
    assert len(joined("a b")["input_ids"]) == 2
    for tokenizer in (WORDS, joined):
        for middle in (1, 2):
            (piece,) = pieces_of(tokenizer, "a b", [[0, middle, 0.5], [middle, 3, 0.5]], append_eos=False)
            first = tokenizer("a", add_special_tokens=False)["input_ids"]
            assert piece.segment_starts == [0, len(first)] and set(piece.scores) == {0.5}


@pytest.mark.parametrize("streaming", [False, True])
def test_documents_of_a_file_carry_their_scores(tmp_path: Path, streaming):
    rows = [{"text": "a b z", "s": [[0, 1, 0.0], [2, 5, 1.0]], "k": 7}, {"text": "b a", "s": 0.25, "k": 8}]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig(
        path=str(file), score_column="s", shuffle=False, streaming=streaming, meta_columns=("k",)
    )
    documents = DocumentStream(data, WORDS).take(2)
    assert [d.scores for d in documents] == [(0, 1, 1, 1), (0.25,) * 3]
    assert [d.meta for d in documents] == [{"k": 7, SEGMENT_STARTS: [0, 1]}, {"k": 8, SEGMENT_STARTS: [0]}]
    assert [document_from_row(document_to_row(d)) for d in documents] == documents
    plain = DocumentStream(DataConfig(path=str(file), shuffle=False), WORDS).take(2)
    assert [d.token_ids for d in plain] == [d.token_ids for d in documents]
    assert plain[0].scores is None and plain[0].meta is None


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "None is neither a finite number nor"),
        (True, "True is neither"),
        ([], r"\[\] is neither"),
        (float("nan"), "nan is neither"),
        ([[0, 1]], r"\[0, 1\] is not \[start, end, score\]"),
        ([[0, 1, None]], "is not"),
        ([[0, 1.5, 1]], "whole characters"),
        ([[0, 2, 1], [1, 3, 1]], "overlaps the one before it .which ends at 2."),
        ([[0, 4, 1]], "beyond the text of 3 characters"),
        ([[1, 1, 1]], "is empty"),
    ],
)
def test_bad_scores_are_refused_where_they_stand(value, message):
    with pytest.raises(ConfigError, match=rf"x\[0\]: column 's': .*{message}"):
        pieces_of(WORDS, "a b", value)


def test_settings_that_have_no_scores_are_refused(values):
    values["data"] |= {"score_column": "s", "answer_column": "answer"}
    with pytest.raises(ConfigError, match="'score_column' .* does not go with 'answer_column'"):
        build(values)
