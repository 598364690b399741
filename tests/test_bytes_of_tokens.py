"""Issue 15.8: bytes come from the tokens, over all families of tokenizers, wherever texts are compared."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from rewards.matching import last_between
from rlpretrain.data.positions import PositionPicker
from rlpretrain.objectives import Setting, rlpt, rpt
from rlpretrain.objectives import pretrain_zero as pz
from rlpretrain.prompts import ensure_delimiters
from rlpretrain.types import Document
from rollout import HFEngine
from rollout.types import FinishReason, Position, Prompt, SamplingParams, Thought
from tests.builders.tiny import tiny_model
from tests.builders.tokenizers_family import BYTES, FAMILIES, make

TEXTS = ["so 漢字漢 it is 🙂🙂 é", "ann has 2 apples and bob", "ü漢ü字", "naïve café 漢"]


def made(module, tokenizer, **fields):
    ensure_delimiters(tokenizer)
    objective = module.OBJECTIVE(module.OBJECTIVE.Config(template="raw", **fields), tokenizer)
    objective.setting = Setting(SamplingParams(max_thought_tokens=8), 2, 0.0)
    return objective


def thought(tokenizer, objective, said):
    """A closed thought after which `said` was sampled; `said` is a text, or token ids."""
    said = tokenizer(said, add_special_tokens=False)["input_ids"] if isinstance(said, str) else list(said)
    ids = (objective.template.close_id, *said)
    return Thought(ids, (-1.0,) * len(ids), FinishReason.CLOSE, 0, 0, (1, len(ids)))


def pieces(tokenizer, ids):
    """The bytes of tokens, by a table of our own: names such as <0xE6>, ▁, and GPT-2's printable bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(b): b for b in plain}
    table |= {chr(256 + k): b for k, b in enumerate(b for b in range(256) if b not in plain)}
    out = []
    for token in tokenizer.convert_ids_to_tokens(ids):
        if token in tokenizer.all_special_tokens:
            out.append(token.encode())
        elif token.startswith("<0x"):
            out.append(bytes([int(token[3:5], 16)]))
        elif "byte_bpe" in tokenizer.name_or_path:
            out.append(bytes(table[c] for c in token))
        else:
            out.append(token.replace("▁", " ").encode())
    return out


def whole(data):
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


@pytest.mark.parametrize("family", sorted(BYTES))
@pytest.mark.parametrize("window", [1, 3, 5, 8])
def test_every_right_prediction_is_right_whatever_the_window_cuts(family, window):
    tokenizer = make(family)
    tokenizer.name_or_path = family
    objective = made(rpt, tokenizer, target_length=window)
    checked = 0
    for text in TEXTS:
        ids = tuple(tokenizer(text)["input_ids"])
        parts = pieces(tokenizer, ids)
        for at in range(2, len(ids)):
            truth, ends = objective.truth(Position("d", at, ids[:at], ids[at : at + window]))
            if not whole(b"".join(parts[:at])):
                assert ends == []
                continue
            heads = [b"".join(parts[at:n]) for n in range(at + 1, min(len(ids), at + window) + 1)]
            assert ends == [len(head) for head in heads if whole(head)]
            for n, head in enumerate(heads, 1):
                if whole(head) and not any(token in tokenizer.all_special_ids for token in ids[at : at + n]):
                    boxed = [*tokenizer("\\boxed{", add_special_tokens=False)["input_ids"], *ids[at : at + n]]
                    boxed += tokenizer.convert_tokens_to_ids(["}"])
                    assert objective.right(thought(tokenizer, objective, boxed), truth, ends)
                    checked += 1
    assert checked > 10


@pytest.mark.parametrize("family", sorted(BYTES))
def test_a_wrong_character_with_the_same_first_bytes_is_wrong(family):
    tokenizer = make(family)
    objective = made(rpt, tokenizer, target_length=4)
    ids = tuple(tokenizer("so 漢字")["input_ids"])
    reader = objective.reader
    at = next(k for k in range(1, len(ids)) if b"\xe6" in reader.raw(ids[k : k + 1], after=ids[:k])[0])
    truth, ends = objective.truth(Position("d", at, ids[:at], ids[at:]))
    for said, right in (("漢", True), ("漣", False), ("\ufffd", False)):
        prefix = " " if truth.startswith(b" ") else ""
        boxed = tokenizer("\\boxed{" + prefix + said + "}", add_special_tokens=False)["input_ids"]
        assert objective.right(thought(tokenizer, objective, boxed), truth, ends) == right


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["before", "after", "sentence"])
def test_markers_and_sentences_are_found_in_every_family(family, kind):
    tokenizer = make(family)
    picker = PositionPicker(kind, tokenizer, per_document=None, marker="is" if kind != "sentence" else None)
    ids = tuple(tokenizer("two is four. The cat ran! and this it is so")["input_ids"])
    found = picker(Document("d", ids), np.random.default_rng(0))
    rest = [tokenizer.decode(ids[i:], skip_special_tokens=True).strip().lower() for i in found]
    wanted = {
        "before": ["is four. the cat ran! and this it is so", "is so"],
        "after": ["four. the cat ran! and this it is so", "so"],
        "sentence": ["the cat ran! and this it is so", "and this it is so"],
    }[kind]
    assert [r.replace(" ", "") for r in rest] == [w.replace(" ", "") for w in wanted]


@pytest.mark.parametrize("family", sorted(BYTES))
def test_markers_are_found_beside_characters_of_several_tokens(family):
    tokenizer = make(family)
    ids = tuple(tokenizer("漢字。漢 is 漢🙂 four")["input_ids"])
    found = {}
    for kind in ("before", "after", "sentence"):
        picker = PositionPicker(
            kind, tokenizer, per_document=None, marker="is" if kind != "sentence" else None
        )
        found[kind] = picker(Document("d", ids), np.random.default_rng(0))
    texts = {
        kind: [tokenizer.decode(ids[i:], skip_special_tokens=True).strip() for i in f]
        for kind, f in found.items()
    }
    assert texts["before"] == ["is 漢🙂 four"] and texts["sentence"] == ["漢 is 漢🙂 four"]
    (after,) = found["after"]
    assert b"".join(picker.text.reader.raw(ids[after:], after=ids[:after])).strip().startswith("漢".encode())


@pytest.mark.parametrize("family", sorted(BYTES))
def test_segments_and_spans_are_compared_as_their_tokens_say(family):
    tokenizer = make(family)
    match = made(rlpt, tokenizer, reward="match", min_words=1, opening="[", closing="]")
    ids = tuple(tokenizer("so it is. 漢字 so")["input_ids"])
    at = next(
        k
        for k in range(2, len(ids))
        if tokenizer.decode(ids[k:], skip_special_tokens=True).strip() == "漢字 so"
    )
    for cut in range(len(ids) - at):  # a window that ends within a character leaves the words before it
        position = Position("d", at - 2, ids[: at - 2], ids[at - 2 : len(ids) - cut])
        begin = match._text(position.target_ids).split()[0]
        assert match.right(thought(tokenizer, match, f"[{begin}]"), position)
    zero = made(pz, tokenizer)
    position = Position("d", len(ids), ids, ())
    assert zero.text(position).strip() == "so it is. 漢字 so"
    assert zero.span(thought(tokenizer, zero, "\\mask{漢字}"), zero.text(position)) == "漢字"
    assert zero.prediction(thought(tokenizer, zero, "\\boxed{漢字}")) == "漢字"


def test_brackets_of_bytes():
    assert last_between(b"\xe6 m[\xe6] m[x[1]\xe6]", b"m[", b"]") == b"x[1]\xe6"
    assert last_between("「漢」".encode(), "「".encode(), "」".encode()) == "漢".encode()
    assert last_between("(a(b)c)", "(", ")") == "b"  # the last opening


@pytest.mark.parametrize("family", ["sentencepiece", "gemma", "byte_bpe"])
def test_a_stop_string_is_seen_where_the_window_begins_within_a_character(family):
    """The engine reads only the last tokens; a run of bytes that begins within a character decodes to
    nothing whole.
    """
    tokenizer = make(family)
    engine = HFEngine(tiny_model("qwen3", vocab_size=len(tokenizer)), tokenizer=tokenizer)
    ids = tokenizer("漢字" * 20 + "」", add_special_tokens=False)["input_ids"]
    near = ids[-(len("」".encode()) + 8) :]
    for first in range(4):
        assert any("」" in text for text in engine._readings(near[first:]))
    assert not any("」" in text for text in engine._readings(ids[:-1]))
    (_,) = asyncio.run(engine.sample([Prompt((5, 6), (), stop_strings=("」",))], SamplingParams(2), 1, [0]))
    engine.close()
