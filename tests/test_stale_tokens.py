"""Issue 15.11: whatever can change the ids changes the key of cached tokens, and a resumed run notices it."""

from __future__ import annotations

import json
import os
import shutil

import datasets
import pytest
from datasets import Dataset
from tokenizers import normalizers
from tokenizers.processors import TemplateProcessing
from transformers import AddedToken, PreTrainedTokenizer

from rlpretrain.config import ConfigError, DataConfig
from rlpretrain.data.fingerprints import fingerprint, older_fingerprint
from rlpretrain.data.stream import DocumentStream, read_all
from rlpretrain.data.tokenization import DocumentSplitter
from rlpretrain.rollouts.replay import ReplaySource
from tests.builders.tokenizers_family import FAMILIES, make


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def path(tmp_path):
    (tmp_path / "d.jsonl").write_text(
        json.dumps({"text": "Two  and two is </s> four é", "a": "eight"}) + "\n"
    )
    return str(tmp_path / "d.jsonl")


def add_start(tokenizer):
    known = [("<s>", tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=known)


def lower(tokenizer):
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()


def other_end(tokenizer):
    tokenizer.eos_token = "<pad>"


def one_token_more(tokenizer):
    tokenizer.add_tokens([AddedToken("and two", normalized=False)])


def split_special(tokenizer):
    tokenizer.split_special_tokens = True


def other_class(tokenizer):
    class Shouting(type(tokenizer)):
        def _encode_plus(self, text, *rest, **more):
            loud = text.upper() if isinstance(text, str) else [t.upper() for t in text]
            return super()._encode_plus(loud, *rest, **more)

    Shouting.__name__ = type(tokenizer).__name__
    tokenizer.__class__ = Shouting


CHANGES = [add_start, lower, other_end, one_token_more, split_special, other_class]


@pytest.mark.parametrize("change", CHANGES)
def test_another_tokenizer_is_not_served_from_the_cache(path, change):
    tokenizer = make("byte_bpe")
    data = DataConfig(path=path)
    first = read_all(data, tokenizer)
    changed = make("byte_bpe")
    change(changed)
    fresh = DocumentSplitter(data, changed, 2).split({"text": ["Two  and two is </s> four é"]}, [0])[0]
    found = read_all(data, changed)
    assert (
        [d.token_ids for d in found]
        == [tuple(piece.token_ids) for piece in fresh]
        != [d.token_ids for d in first]
    )


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_a_resumed_run_notices_another_tokenizer(path, change, streaming):
    data = DataConfig(path=path, streaming=streaming)
    state = DocumentStream(data, make("byte_bpe")).state_dict()
    DocumentStream(data, make("byte_bpe")).load_state_dict(state)
    changed = make("byte_bpe")
    change(changed)
    with pytest.raises(ConfigError, match="tokenizer"):
        DocumentStream(data, changed).load_state_dict(state)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fingerprint_does_not_change_by_use_or_by_saving(family, tmp_path):
    tokenizer = make(family)
    before = fingerprint(tokenizer)
    tokenizer(["two", "two and two"], padding=True, truncation=True, max_length=2)
    tokenizer.chat_template = "{{ messages }}"
    assert fingerprint(tokenizer) == before == fingerprint(make(family))
    tokenizer.save_pretrained(tmp_path / "saved")
    loaded = type(tokenizer).from_pretrained(tmp_path / "saved")
    assert fingerprint(loaded) == before
    assert len({fingerprint(make(name)) for name in FAMILIES}) == len(FAMILIES)


def test_a_checkpoint_with_the_older_fingerprint_still_loads(path):
    data, tokenizer = DataConfig(path=path), make("gemma")
    state = DocumentStream(data, tokenizer).state_dict()
    state["identity"]["tokenizer"] = older_fingerprint(tokenizer)
    del state["identity"]["tokenizer_ids"]
    DocumentStream(data, tokenizer).load_state_dict(state)


class InPython(PreTrainedTokenizer):
    """A tokenizer without a `tokenizers` object: what it does is in its attributes and its code."""

    def __init__(self, step=1, **more):
        self.step, self.letters = step, {chr(97 + i): i for i in range(26)} | {"<eos>": 26}
        super().__init__(eos_token="<eos>", **more)

    @property
    def vocab_size(self):
        return 27

    def get_vocab(self):
        return dict(self.letters)

    def _tokenize(self, text, **more):
        return [c for c in text.lower()[:: self.step] if c in self.letters]

    def _convert_token_to_id(self, token):
        return self.letters.get(token)

    def _convert_id_to_token(self, index):
        return next(token for token, i in self.letters.items() if i == index)


def test_a_tokenizer_in_python_is_more_than_its_vocabulary(path):
    one, two = InPython(1), InPython(2)
    assert one.get_vocab() == two.get_vocab() and fingerprint(one) != fingerprint(two)
    data = DataConfig(path=path)
    assert read_all(data, one)[0].token_ids != read_all(data, two)[0].token_ids
    assert fingerprint(InPython(1)) == fingerprint(one)


@pytest.mark.parametrize(
    "change",
    [
        {"append_eos": False},
        {"max_length": 5},
        {"max_length": 5, "long": "truncate"},
        {"column": "a"},
        {"answer_column": "a"},
        {"answer_column": "a", "answer_join": " "},
    ],
)
def test_every_setting_that_decides_ids_is_in_the_key(path, change):
    tokenizer = make("byte_bpe")
    first = read_all(DataConfig(path=path), tokenizer)
    found = read_all(DataConfig(path=path, **change), tokenizer)
    shutil.rmtree(datasets.config.HF_DATASETS_CACHE)
    assert [d.token_ids for d in found] == [
        d.token_ids for d in read_all(DataConfig(path=path, **change), tokenizer)
    ]
    assert [d.token_ids for d in found] != [d.token_ids for d in first]


@pytest.mark.parametrize("form", ["jsonl", "txt", "csv", "parquet", "saved"])
def test_another_file_of_the_same_name_and_size_is_read(tmp_path, form):
    place, tokenizer = tmp_path / f"d.{form}", make("byte_bpe")

    def write(text):
        rows = Dataset.from_dict({"text": [text]})
        if form == "saved":
            rows._fingerprint = "always the same"
            shutil.rmtree(place, ignore_errors=True)
            rows.save_to_disk(str(place))
        elif form == "txt":
            place.write_text(text + "\n")
        else:
            {"jsonl": rows.to_json, "csv": rows.to_csv, "parquet": rows.to_parquet}[form](str(place))
        return os.path.getsize(place)

    write("two four")
    first = read_all(DataConfig(path=str(place)), tokenizer)
    write("four two")
    second = read_all(DataConfig(path=str(place)), tokenizer)
    assert [d.token_ids for d in first] != [d.token_ids for d in second]
    assert tokenizer.decode(list(second[0].token_ids), skip_special_tokens=True) == "four two"


def test_a_resumed_replay_notices_another_tokenizer(tmp_path):
    from rollout.store import Store
    from rollout.types import Document

    Store(tmp_path).write(1, [], [Document("d", (1, 2, 3))], {})
    state = ReplaySource(Store(tmp_path), tokenizer=fingerprint(make("byte_bpe"))).state_dict()
    ReplaySource(Store(tmp_path), tokenizer=fingerprint(make("byte_bpe"))).load_state_dict(state)
    ReplaySource(Store(tmp_path), tokenizer=fingerprint(make("gemma"))).load_state_dict(
        {"done": 0}
    )  # an older checkpoint
    with pytest.raises(ConfigError, match="the tokenizer is another one"):
        ReplaySource(Store(tmp_path), tokenizer=fingerprint(make("gemma"))).load_state_dict(state)
