"""The tokenizers of tests/builders/tokenizers_family.py have the properties that their names say."""

import pytest

from tests.builders.tokenizers_family import BYTES, FAMILIES, LINES, LOSSLESS, WITH_BOS, WITH_EOS, make


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_what_it_says(name):
    tokenizer = make(name)
    ids = tokenizer(LINES[0])["input_ids"]
    assert (ids[0] == tokenizer.bos_token_id) == (name in WITH_BOS)
    assert (ids[-1] == tokenizer.eos_token_id) == (name in WITH_EOS)
    unknown = tokenizer.unk_token_id in tokenizer("漢字 🙂")["input_ids"]
    assert unknown == (name not in BYTES)
    if name in LOSSLESS:
        for line in LINES:
            assert tokenizer.decode(tokenizer(line)["input_ids"], skip_special_tokens=True) == line


def test_what_makes_the_families_differ():
    def pieces(name, text):
        tokenizer = make(name)
        return tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False)["input_ids"])

    assert (
        pieces("byte_bpe", "4") == ["4"]
        and pieces("gemma", "4") == ["4"]
        and pieces("wordpiece", "Cat") == ["cat"]
    )
    for name in ("sentencepiece", "sentencepiece_legacy", "metaspace"):
        assert "".join(pieces(name, "4")) == "▁4"  # the dummy prefix
    assert pieces("sentencepiece", "漢")[-3:] == ["<0xE6>", "<0xBC>", "<0xA2>"]
    assert len(make("sentencepiece")) > 0 and make("sentencepiece") is not make("sentencepiece")
