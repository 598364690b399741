"""Prompts: the document's own ids in every arm, tags that are single tokens, a model that knows them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from rlpretrain.config import ConfigError
from rlpretrain.prompts import TEMPLATES, Delimiters, ThoughtPrompt, ensure_delimiters, strip_thoughts
from rollout.types import Position
from tests.builders.tiny import ARCHITECTURES, bpe_tokenizer, tiny_model, word_tokenizer

LINE = "Natalia sold 48/2 = 24 clips in May. naïve café 漢字"
TAGS = ["<think>", "</think>"]


def word():
    return word_tokenizer(["ann", "has", "6", "<think>", "</think>"])


def bpe():
    tokenizer = bpe_tokenizer([LINE, TEMPLATES["rlp"]], 400)
    ensure_delimiters(tokenizer)
    return tokenizer


BPE = bpe()


def position(tokenizer, text=LINE, index=4, target_length=2):
    ids = tuple(tokenizer(text)["input_ids"])
    return Position("d", index, ids[:index], ids[index : index + target_length])


# Tags


def test_tags_that_are_there_stay():
    tokenizer, model = word(), tiny_model(vocab_size=8)
    before = [p.clone() for p in model.parameters()]
    assert ensure_delimiters(tokenizer, model) == []
    assert len(tokenizer) == 8
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_missing_tags_are_added_as_single_visible_tokens():
    tokenizer = bpe_tokenizer([LINE], 300)
    assert ensure_delimiters(tokenizer) == TAGS
    assert ensure_delimiters(tokenizer) == []
    open_id, close_id = tokenizer.convert_tokens_to_ids(TAGS)
    ids = tokenizer("in<think> sold</think> May")["input_ids"]
    assert ids.count(open_id) == ids.count(close_id) == 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == "in<think> sold</think> May"


def test_only_the_missing_tag_is_added_and_it_is_said():
    tokenizer = word_tokenizer(["a", "<think>"])
    assert ensure_delimiters(tokenizer) == ["</think>"]
    assert ensure_delimiters(tokenizer, delimiters=Delimiters("[[", "]]")) == ["[[", "]]"]


def test_tags_survive_saving(tmp_path):
    from transformers import AutoTokenizer

    BPE.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "in<think> sold</think> May"
    assert again(text)["input_ids"] == BPE(text)["input_ids"]
    assert ensure_delimiters(again) == []


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_small_table_grows_near_its_mean(architecture):
    tokenizer, model = word_tokenizer(["ann", "has", "6"]), tiny_model(architecture, vocab_size=6)
    ids = torch.tensor([tokenizer("ann has 6 ann")["input_ids"]])
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    with torch.no_grad():
        before = model(ids, attention_mask=torch.ones_like(ids)).logits
    old = model.get_input_embeddings().weight.detach().clone()
    torch.manual_seed(0)
    assert ensure_delimiters(tokenizer, model) == TAGS
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert table.shape[0] == head.shape[0] == model.config.vocab_size == len(tokenizer) == 8
    assert (table is head) == tied == model.config.tie_word_embeddings
    assert torch.equal(table[:6], old)
    assert torch.allclose(table[6:], old.mean(0).expand(2, -1), atol=1e-2)
    with torch.no_grad():
        after = model(ids, attention_mask=torch.ones_like(ids)).logits
    assert torch.allclose(after[..., :6], before, atol=1e-6)  # nothing else changed


def test_growing_is_deterministic_under_the_seed():
    def grown(seed):
        model = tiny_model("llama", vocab_size=6)
        torch.manual_seed(seed)
        ensure_delimiters(word_tokenizer(["ann", "has", "6"]), model)
        return torch.cat([model.get_input_embeddings().weight, model.get_output_embeddings().weight])

    assert torch.equal(grown(1), grown(1))


@pytest.mark.parametrize("architecture", ["qwen3", "llama"])  # tied and not
def test_spare_rows_are_used_and_set_to_the_mean(architecture):
    tokenizer, model = word_tokenizer(["ann", "has", "6"]), tiny_model(architecture, vocab_size=64)
    tables = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    old = [table.detach().clone() for table in tables]
    ensure_delimiters(tokenizer, model)
    assert model.get_input_embeddings().weight is tables[0] and len(tables[0]) == 64  # not resized
    for table, before in zip(tables, old, strict=True):
        assert torch.equal(table[:6], before[:6]) and torch.equal(table[8:], before[8:])
        assert torch.allclose(table[6:8], before[:6].mean(0).expand(2, -1))
        assert table.requires_grad


@pytest.mark.parametrize("size", [None, 512])  # a table that grows, and one with spare rows
@pytest.mark.parametrize("architecture", ["qwen3", "llama"])  # tied and not
def test_a_new_tag_starts_as_the_mean_of_its_own_pieces(architecture, size):
    """Issue 15.21: a base that never saw the tags begins nearer to reading on behind them."""
    tokenizer = bpe_tokenizer([LINE, "think"], 300)
    pieces = {tag: tokenizer(tag)["input_ids"] for tag in TAGS}
    model = tiny_model(architecture, vocab_size=size or len(tokenizer))
    old = [t.weight.detach().clone() for t in (model.get_input_embeddings(), model.get_output_embeddings())]
    assert ensure_delimiters(tokenizer, model) == TAGS
    for table, before in zip((model.get_input_embeddings(), model.get_output_embeddings()), old, strict=True):
        for tag in TAGS:
            row = table.weight[tokenizer.convert_tokens_to_ids(tag)]
            assert torch.allclose(row, before[pieces[tag]].mean(0), atol=1e-6), tag
            assert len(pieces[tag]) > 1, "a tag of one piece would show nothing"
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == (
        architecture == "qwen3"
    )


def test_one_spare_row_and_one_to_grow():
    tokenizer, model = word_tokenizer(["ann", "has", "6"]), tiny_model(vocab_size=7)
    mean = model.get_input_embeddings().weight[:6].mean(0)
    ensure_delimiters(tokenizer, model)
    table = model.get_input_embeddings().weight
    assert len(table) == 8 and torch.allclose(table[6], mean) and torch.allclose(table[7], mean, atol=1e-2)


def test_table_too_small_for_a_tokenizer_that_has_the_tags():
    model = tiny_model(vocab_size=6)
    assert ensure_delimiters(word(), model) == []
    assert model.get_input_embeddings().weight.shape[0] == 8


@pytest.mark.parametrize("tags", [("", "x"), ("x", " "), ("x", "x")])
def test_tags_must_differ(tags):
    with pytest.raises(ConfigError, match="two different tags"):
        Delimiters(*tags)


# Prompts


def test_raw_prompt():
    tokenizer = word()
    prompt = ThoughtPrompt(tokenizer)(position(tokenizer, "ann has 6 ann", 3, 1))
    open_id, close_id = tokenizer.convert_tokens_to_ids(TAGS)
    assert prompt.token_ids == (*tokenizer("ann has 6")["input_ids"], open_id)
    assert prompt.stop_ids == prompt.close_ids == (close_id,)
    assert prompt.join_ids == () and prompt.stop_strings == ()


@settings(max_examples=60, deadline=None)
@given(
    text=st.text(alphabet=" \nanclips4.<>é漢", min_size=1, max_size=30),
    cut=st.floats(0, 1),
    template=st.sampled_from(["raw", "rlp", "Q {context}A", " {context} "]),
)
def test_context_is_never_tokenised_again(text, cut, template):
    """Wherever the cut falls, even inside a character, every arm holds the document's own ids, in one
    piece.
    """
    ids = tuple(BPE(text)["input_ids"])
    i = round(cut * (len(ids) - 1))
    where = Position("d", i, ids[:i], ids[i:])
    prompt = ThoughtPrompt(BPE, template=template)
    open_id, close_id = BPE.convert_tokens_to_ids(TAGS)
    framed = prompt.no_think(where, "template")
    assert framed == prompt.head + where.context_ids + prompt.tail
    assert prompt(where).token_ids == (*framed, open_id)
    assert prompt.no_think(where, "raw") == where.context_ids
    assert prompt.no_think(where, "empty_thought") == (*framed, open_id, close_id)
    if template == "raw":
        assert framed == where.context_ids
        assert prompt.no_think(where) + where.target_ids == ids


def test_rlp_template_frames_the_context():
    text = BPE.decode(ThoughtPrompt(BPE, template="rlp")(position(BPE)).token_ids)
    head, tail = (
        TEMPLATES["rlp"].replace("{open}", "<think>").replace("{close}", "</think>").split("{context}")
    )
    assert text == head + BPE.decode(position(BPE).context_ids) + tail + "<think>"


def test_template_with_braces_and_other_tags():
    tokenizer = bpe_tokenizer([LINE], 300)
    tags = Delimiters("[", "]")
    ensure_delimiters(tokenizer, delimiters=tags)
    prompt = ThoughtPrompt(tokenizer, tags, "\\frac{1}{2} {open}{close} {context} go")
    assert tokenizer.decode(prompt.head) == "\\frac{1}{2} [] " and tokenizer.decode(prompt.tail) == " go"
    assert prompt.open_id == tokenizer.convert_tokens_to_ids("[")


def test_bos_stays_first():
    tokenizer = word_tokenizer(["<s>", "ann", "has", "6", "say", *TAGS])
    tokenizer.bos_token = "<s>"
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)]
    )
    prompt = ThoughtPrompt(tokenizer, template="say {context}")
    whole = position(tokenizer, "ann has 6", 3, 1)
    assert tokenizer.decode(prompt(whole).token_ids) == "<s> say ann has <think>"
    assert prompt.no_think(whole) == whole.context_ids
    piece = Position(
        "d", 1, tuple(tokenizer.convert_tokens_to_ids(["ann"])), ()
    )  # without one, none is made up
    assert tokenizer.decode(prompt(piece).token_ids) == "say ann <think>"


def test_refused_prompts():
    with pytest.raises(ConfigError, match="lacks the token <think> and </think>: call ensure_delimiters"):
        ThoughtPrompt(word_tokenizer(["a"]))
    with pytest.raises(ConfigError, match="no template 'rpl': did you mean 'rlp'"):
        ThoughtPrompt(BPE, template="rpl")
    with pytest.raises(ConfigError, match="with {context} in it once"):
        ThoughtPrompt(BPE, template="{context} and {context}")
    with pytest.raises(ConfigError, match="must not end with {open}"):
        ThoughtPrompt(BPE, template="{context} {open} ")
    with pytest.raises(ConfigError, match="no_think must be raw, template or empty_thought, got 'none'"):
        ThoughtPrompt(BPE).no_think(position(BPE), "none")


# Without thoughts


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("The answer is<think> 2 and 2 </think> 4.", "The answer is 4."),
        ("a<think>b</think>c<think>d\ne</think>f", "acf"),
        ("opened by the prompt </think> 4", " 4"),
        ("b</think>c<think>d</think>e", "ce"),
        ("a <think> never closed", "a "),
        ("a<think>b<think>c</think>d", "ad"),
        ("nothing here", "nothing here"),
        ("", ""),
    ],
)
def test_strip_thoughts(text, left):
    assert strip_thoughts(text) == left


def test_strip_thoughts_with_other_tags():
    assert strip_thoughts("a[b]c <think>", Delimiters("[", "]")) == "ac <think>"
