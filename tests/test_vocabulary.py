"""Tokenizers whose ids have holes: tables are sized by the largest id, and a new tag takes nobody's id
(issue 15.19).
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from rlpretrain import Pretrainer
from rlpretrain.config import ConfigError
from rlpretrain.config.io import build
from rlpretrain.corpora import dial
from rlpretrain.prompts import ensure_delimiters, table_size
from tests.builders.tiny import bpe_tokenizer, tiny_model

WORDS = ["<pad>", "<eos>", "<unk>", "ann", "has", "6", "bob"]


def holed(step: int = 3, extra: dict[str, int] | None = None) -> PreTrainedTokenizerFast:
    """A word tokenizer with the ids 0, 3, 6, ...; `extra` words have the ids given."""
    vocabulary = {word: step * i for i, word in enumerate(WORDS)} | (extra or {})
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def holed_bpe() -> PreTrainedTokenizerFast:
    """Byte-level BPE whose last token has an id far behind the others."""
    state = json.loads(
        bpe_tokenizer(["ann has 6 apples and bob has none"] * 3, 300).backend_tokenizer.to_str()
    )
    vocabulary = state["model"]["vocab"]
    vocabulary[max(vocabulary, key=vocabulary.__getitem__)] += 9
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), pad_token="<pad>", eos_token="<eos>"
    )


@pytest.mark.parametrize("make", [holed, holed_bpe])
def test_new_tags_take_nobodys_id(make, tmp_path):
    tokenizer = make()
    before, largest = tokenizer("ann has 6 bob")["input_ids"], table_size(tokenizer) - 1
    assert len(tokenizer) <= largest
    model = tiny_model("qwen3", vocab_size=largest + 1)
    assert ensure_delimiters(tokenizer, model) == ["<think>", "</think>"]
    ids = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    assert ids == [largest + 1, largest + 2] and table_size(tokenizer) == largest + 3
    assert model.get_input_embeddings().weight.shape[0] == largest + 3
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for known in (tokenizer, again):
        assert known("ann has 6 bob")["input_ids"] == before
        assert known.convert_tokens_to_ids(["<think>", "</think>"]) == ids
        assert known.decode(before).replace(" ", "") == "annhas6bob"
    assert ensure_delimiters(again) == []


def test_a_table_too_small_for_the_largest_id_grows_to_it():
    tokenizer = holed(extra={"<think>": 40, "</think>": 41})
    model = tiny_model("qwen3", vocab_size=len(tokenizer))
    assert ensure_delimiters(tokenizer, model) == []
    assert model.get_input_embeddings().weight.shape[0] == 42
    assert torch.isfinite(model(torch.tensor([[40, 18, 41]])).logits).all()


def test_new_tags_in_spare_rows_take_the_mean_of_the_rows_in_use():
    tokenizer, model = holed(), tiny_model("qwen3", vocab_size=32)
    rows = model.get_input_embeddings().weight
    expected = rows[[3 * i for i in range(len(WORDS))]].detach().mean(0)
    ensure_delimiters(tokenizer, model)
    for i in tokenizer.convert_tokens_to_ids(["<think>", "</think>"]):
        torch.testing.assert_close(rows[i].detach(), expected)


def test_a_tokenizer_that_gives_out_the_ids_of_others_is_refused():
    class Closed(PreTrainedTokenizerFast):
        """Cannot be looked into, so its holes cannot be filled."""

        backend_tokenizer = None

    ids = dict(zip(WORDS, [0, 1, 2, 3, 4, 7, 8], strict=True))  # seven words: the next token gets id 7
    closed = Closed(tokenizer_object=Tokenizer(models.WordLevel(ids, unk_token="<unk>")), unk_token="<unk>")
    with pytest.raises(ConfigError, match=r"ids that others have \(7, 8\).*objective\.open"):
        ensure_delimiters(closed)


def test_a_run_from_such_a_base(values, tmp_path: Path):
    """A dial base whose last word stands twenty ids behind the others, without tags."""
    words = [word for word in dial.WORDS if word not in (dial.OPEN, dial.CLOSE)]
    words = list(dict.fromkeys(["<pad>", "<eos>", "<unk>", *words]))
    vocabulary = {word: i for i, word in enumerate(words)} | {words[-1]: len(words) + 20}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    largest = max(vocabulary.values())
    fast.save_pretrained(tmp_path / "base")
    tiny_model("qwen3", vocab_size=largest + 1).save_pretrained(tmp_path / "base")
    Pretrainer(build(values | {"model": str(tmp_path / "base"), "max_steps": 1, "objective": "rlp"})).train()
    saved = Path(values["output_dir"]) / "model"
    assert AutoTokenizer.from_pretrained(saved).convert_tokens_to_ids("</think>") == largest + 2
    assert AutoModelForCausalLM.from_pretrained(saved).config.vocab_size == largest + 3
