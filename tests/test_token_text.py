"""Every character stands with the token that gave it: page, console, trackers, all families of tokenizers
(issue 15.23).
"""

from __future__ import annotations

import io
import re
from dataclasses import replace

import pytest
from rich.console import Console as Rich
from transformers.convert_slow_tokenizer import bytes_to_unicode

from rlpretrain.data.token_text import SPACES, TokenReader, _byte_level_alphabet
from rlpretrain.prompts import ThoughtPrompt, ensure_delimiters
from rlpretrain.reporting.html import Report, render
from rlpretrain.reporting.token_gains import score_positions
from rlpretrain.tracking.console import thought_table
from rlpretrain.tracking.trackers import thought_rows
from rlpretrain.types import Document
from rollout.types import FinishReason, Group, Position, Thought
from tests.builders.html import Seen
from tests.builders.tiny import word_tokenizer
from tests.builders.tokenizers_family import BYTES, FAMILIES, make

TEXTS = ["so  漢 it\n\n goes a. 🙂 \ufffd x", " hi there", "don't (2+2 = 4)\tso", "naïve café"]


def text_of(tokenizer, ids):
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("text", TEXTS)
def test_characters_belong_to_the_token_that_gave_them(family, text):
    tokenizer = make(family)
    reader, ids = TokenReader(tokenizer), tokenizer(text)["input_ids"]
    tokens = reader(ids)
    assert "".join(token.text for token in tokens) == text_of(tokenizer, ids)
    for k, token in enumerate(tokens):
        assert token.label and token.spelled.strip() and token.inline.strip()  # nothing is invisible
        if family in BYTES:  # what is there after this token and was not before it
            before, after = (text_of(tokenizer, ids[:n]).rstrip("\ufffd") for n in (k, k + 1))
            whole = text_of(tokenizer, ids)
            if "\ufffd" not in text and whole.startswith(after):
                assert token.text == after[len(before) :]
    for cut in range(1, len(ids)):  # wherever a reader begins
        assert reader(ids[cut:], after=ids[:cut]) == tokens[cut:]


@pytest.mark.parametrize("family", sorted(BYTES))
def test_a_character_of_several_tokens_is_the_last_ones(family):
    tokenizer = make(family)
    tokens = TokenReader(tokenizer)(tokenizer("so 漢\ufffd", add_special_tokens=False)["input_ids"])
    assert [t.label for t in tokens[-6:]] == ["⟨E6⟩", "⟨BC⟩", "漢", "⟨EF⟩", "⟨BF⟩", "\ufffd"]
    assert [t.text for t in tokens[-6:]] == ["", "", "漢", "", "", "\ufffd"]


@pytest.mark.parametrize("family", sorted(BYTES))
def test_bytes_that_are_no_character_stay_with_their_tokens(family):
    """A sampled thought may hold any bytes: a first byte without the rest, a last one without the first."""
    tokenizer = make(family)
    first, second, third = tokenizer("漢", add_special_tokens=False)["input_ids"][-3:]
    word = tokenizer(" it", add_special_tokens=False)["input_ids"]
    tokens = TokenReader(tokenizer)([first, *word, third, first, second], after=word)
    assert [t.label for t in tokens] == ["⟨E6⟩", *[t.label for t in tokens[1:-3]], "⟨A2⟩", "⟨E6⟩", "⟨BC⟩"]
    middle = TokenReader(tokenizer).text(word, after=word)
    assert middle.strip() == "it" and "".join(t.text for t in tokens) == f"\ufffd{middle}\ufffd\ufffd\ufffd"


def test_a_token_of_several_characters_and_parts_of_two():
    """One token that ends a character, holds another and begins a third: its characters are those it
    finishes.
    """
    alphabet = {byte: c for c, byte in _byte_level_alphabet().items()}
    assert alphabet == bytes_to_unicode()
    data = "漢 é字".encode()
    parts = [data[:2], data[2:7], data[7:]]
    tokenizer = make("byte_bpe")
    names = ["".join(alphabet[b] for b in part) for part in parts]
    known = {9000 + k: name for k, name in enumerate(names)}
    reader = TokenReader(tokenizer)
    reader.tokenizer = type("Vocabulary", (), {"convert_ids_to_tokens": lambda self, i: known[i]})()
    assert [t.text for t in reader(list(known))] == ["", "漢 é", "字"]
    assert [t.label for t in reader(list(known))] == ["⟨E6⟩⟨BC⟩", "漢 é⟨E5⟩", "字"]


def test_a_token_without_any_character_is_named():
    tokenizer = make("metaspace")
    ids = tokenizer(" hi")["input_ids"]
    assert TokenReader(tokenizer)(ids)[0].label == "⟨▁⟩" and text_of(tokenizer, ids) == "hi"
    words = word_tokenizer(["a", "b"])
    assert [t.text for t in TokenReader(words)(words("a b a")["input_ids"])] == ["a", " b", " a"]


def group_of(tokenizer, text: str, at: int, size: int = 1) -> tuple[Document, Group]:
    """A position of a text, with a thought that begins with a word as it stands inside a text."""
    ids = tuple(tokenizer(text)["input_ids"])
    position = Position("d", at, ids[:at], ids[at : at + size])
    thought = tuple(tokenizer("two and two", add_special_tokens=False)["input_ids"])
    prompt = ThoughtPrompt(tokenizer)(position)
    said = Thought(thought, (0.0,) * len(thought), FinishReason.CLOSE, 0, 0)
    return Document("d", ids), Group(f"g{at}", position, prompt, (said,), 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_page_shades_what_each_token_gave(family):
    """A link for every token but the first: none is empty, and links and text together are the document."""
    tokenizer = make(family)
    ensure_delimiters(tokenizer)
    text = "so  漢 it\n\n goes a ."
    size = len(tokenizer(text)["input_ids"])
    made = [group_of(tokenizer, text, at) for at in range(1, size)]
    groups = [replace(g, rewards=(0.5,)) for _, g in made]
    page = render(Report("t", [(made[0][0], score_positions(groups, {}))], tokenizer))
    (body,) = re.findall(r'<p class="text" dir="auto">(.*?)</p>', page, re.S)
    links = [Seen(link).text for link in re.findall(r"<a [^>]*>(.*?)</a>", body, re.S)]
    reader = TokenReader(tokenizer)
    tokens = reader(made[0][0].token_ids)
    assert links == [token.inline for token in tokens[1:]] and all(link.strip() for link in links)
    shown = Seen(body).text
    for mark in re.findall(r"⟨[0-9A-F]{2}⟩", shown):
        shown = shown.replace(mark, "", 1)
    shown = shown.replace("⏎", "").replace("␣", " ")
    assert shown == text_of(tokenizer, made[0][0].token_ids)
    assert all(label.strip(": ") for label in re.findall(r'aria-label="([^"]*): no gain known', body))
    targets = [Seen(q).text for q in re.findall(r"<q>(.*?)</q>", page, re.S)]
    assert targets == [token.spelled for token in tokens[1:]]


@pytest.mark.parametrize("family", FAMILIES)
def test_console_and_trackers_show_the_target_as_it_stands(family):
    """A target keeps its space, a lone one is seen, and a thought begins as it does behind its tag."""
    tokenizer = make(family)
    ensure_delimiters(tokenizer)
    reader, text = TokenReader(tokenizer), "so  it goes a ."
    ids = tokenizer(text)["input_ids"]
    for at in range(1, len(ids)):
        _, group = group_of(tokenizer, text, at)
        expected = reader(ids)[at].spelled
        assert expected.strip() and not set(expected) & set(SPACES)
        ((_, context, target, thought, *_),) = thought_rows([group], tokenizer)
        assert target == expected and context == reader.text(ids[:at])
        whole = text_of(tokenizer, [*group.prompt.token_ids, *group.thoughts[0].token_ids])
        assert whole.endswith(thought) and len(thought.strip()) >= len("two and two") - 3
        rich = Rich(width=200, record=True, file=io.StringIO())
        rich.print(thought_table(group, tokenizer))
        assert f"▸ {expected}" in rich.export_text()
