"""Issue 15.10: names are literal, all files of a folder are read, and strings stay strings, in every
format.
"""

from __future__ import annotations

import bz2
import datetime
import gzip
import json

import datasets
import pandas as pd
import pytest

from rlpretrain.config import ConfigError, DataConfig
from rlpretrain.data.stream import CHUNK, DocumentStream, read_all
from tests.builders.tokenizers_family import make

TOKENIZER = make("byte_bpe")
FORMS = ["txt", "jsonl", "json", "ndjson", "csv", "tsv", "parquet", "jsonl.gz", "csv.bz2"]
CELLS = [
    "None",
    "NA",
    "null",
    "nan",
    "N/A",
    "2024-01-01",
    "2024-01-01T10:00:00Z",
    "10:30:00",
    "123",
    "1.50",
    "007",
    "true",
    "1e5",
    "-inf",
    " lead",
    "trail ",
    "#N/A",
    "[1, 2]",
    '{"a": 1}',
    "it's",
    "naïve 漢",
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(path, form, texts, bom=b"", **more):
    """A file of one of FORMS with a column `text`, and others beside it."""
    rows = [
        {"text": text, **{name: values[k] for name, values in more.items()}} for k, text in enumerate(texts)
    ]
    kind, _, packed = form.partition(".")
    if kind == "parquet":
        pd.DataFrame(rows).to_parquet(path)
        return str(path)
    if kind == "txt":
        data = "".join(text + "\n" for text in texts)
    elif kind == "json":
        data = json.dumps(rows, indent=1)
    elif kind in ("csv", "tsv"):
        data = pd.DataFrame(rows).to_csv(index=False, sep="\t" if kind == "tsv" else ",")
    else:
        data = "".join(json.dumps(row) + "\n" for row in rows)
    data = bom + data.encode()
    path.write_bytes({"gz": gzip.compress, "bz2": bz2.compress}.get(packed, bytes)(data))
    return str(path)


def read(path, **more):
    documents = read_all(DataConfig(path=str(path), append_eos=False, **more), TOKENIZER, min_length=1)
    return [TOKENIZER.decode(list(d.token_ids), clean_up_tokenization_spaces=False) for d in documents]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_strings_stay_strings(tmp_path, form, streaming):
    path = write(tmp_path / f"d.{form}", form, CELLS)
    assert read(path, streaming=streaming) == CELLS


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("text", ["2024-01-01", "NA", "123"])
def test_a_column_of_one_kind_of_string_stays_one(tmp_path, form, streaming, text):
    """Where all cells look alike, a reader that guesses takes the whole column for dates, numbers or
    nothing.
    """
    assert read(write(tmp_path / f"d.{form}", form, [text] * 3), streaming=streaming) == [text] * 3


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("form", ["jsonl", "json", "parquet"])
def test_other_columns_are_what_they_are(tmp_path, form, streaming):
    more = {"day": ["2024-01-01", "2024-01-02"], "n": [1, 2], "list": [["NA"], ["x"]], "x": [0.5, None]}
    path = write(tmp_path / f"d.{form}", form, ["two", "four"], **more)
    data = DataConfig(path=path, meta_columns=("day", "n", "list", "x"), streaming=streaming)
    found = [d.meta for d in read_all(data, TOKENIZER, min_length=1)]
    assert (
        found[0] == {"day": "2024-01-01", "n": 1, "list": ["NA"], "x": 0.5}
        and found[1]["day"] == "2024-01-02"
    )
    assert found[1]["x"] is None or found[1]["x"] != found[1]["x"]


@pytest.mark.parametrize("streaming", [False, True])
def test_other_columns_of_a_table_keep_their_words(tmp_path, streaming):
    path = write(tmp_path / "d.csv", "csv", ["two", "four"], label=["NA", "None"], n=[1, 2], same=["two", ""])
    data = DataConfig(path=path, meta_columns=("label", "n", "same"), streaming=streaming)
    assert [d.meta for d in read_all(data, TOKENIZER, min_length=1)] == [
        {"label": "NA", "n": 1, "same": "two"},
        {"label": "None", "n": 2, "same": None},
    ]


def test_values_of_mixed_types_and_missing_keys(tmp_path):
    rows = [
        {"text": "two", "k": 1},
        {"text": "four", "k": "one"},
        {"text": "so"},
        {"text": "it", "k": {"a": [1]}},
    ]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig(path=str(tmp_path / "d.jsonl"), meta_columns=("k",))
    assert [d.meta["k"] for d in read_all(data, TOKENIZER, min_length=1)] == [1, "one", None, {"a": [1]}]


def test_dates_of_parquet_travel_as_dates(tmp_path):
    path = write(tmp_path / "d.parquet", "parquet", ["two"], day=[datetime.datetime(2024, 1, 2)])
    (document,) = read_all(DataConfig(path=path, meta_columns=("day",)), TOKENIZER, min_length=1)
    assert document.meta["day"] == datetime.datetime(2024, 1, 2)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["docs[12]", "docs*", "docs?", "[a-z]"])
@pytest.mark.parametrize("form", ["txt", "jsonl", "csv", "parquet", "jsonl.gz"])
def test_names_are_literal(tmp_path, name, form, streaming):
    for neighbour in ("docs1", "docs12", "docsx", "a"):
        write(tmp_path / f"{neighbour}.{form}", form, ["wrong"])
    path = write(tmp_path / f"{name}.{form}", form, ["right"])
    assert read(path, streaming=streaming) == ["right"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("form", ["txt", "csv", "parquet"])
def test_a_folder_and_a_pattern_may_hold_brackets(tmp_path, form, streaming):
    (tmp_path / "data[1]").mkdir()
    (tmp_path / "data1").mkdir()
    write(tmp_path / "data1" / f"a.{form}", form, ["wrong"])
    write(tmp_path / "data[1]" / f"a[1].{form}", form, ["a"])
    write(tmp_path / "data[1]" / f"a1.{form}", form, ["b"])
    assert sorted(read(tmp_path / "data[1]", streaming=streaming)) == ["a", "b"]
    assert sorted(read(tmp_path / "data[[]1]" / "a*", streaming=streaming)) == ["a", "b"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("form", ["txt", "jsonl", "csv", "parquet"])
def test_all_files_of_a_folder_are_read(tmp_path, form, streaming):
    folder = tmp_path / "data"
    (folder / "inner").mkdir(parents=True)
    for name in ("docs", "inner/more", "train_extra", "z.test"):
        write(folder / f"{name}.{form}", form, [name])
    (folder / "README.md").write_text("about")
    (folder / ".hidden.jsonl").write_text("no")
    assert read(folder, streaming=streaming) == ["docs", "inner/more", "train_extra", "z.test"]
    with pytest.raises(ConfigError, match='Unknown split "test": .* has train, by the names'):
        read(folder, streaming=streaming, split="test")


def test_a_folder_whose_files_are_named_for_splits(tmp_path):
    folder = tmp_path / "data"
    (folder / "dev").mkdir(parents=True)
    for name in ("train", "train-2", "test_a", "dev/x"):
        write(folder / f"{name}.jsonl", "jsonl", [name])
    assert read(folder) == ["train-2", "train"] or read(folder) == ["train", "train-2"]
    assert read(folder, split="test") == ["test_a"] and read(folder, split="validation") == ["dev/x"]
    with pytest.raises(ConfigError, match='Unknown split "other": .* has test, train, validation'):
        read(folder, split="other")


def test_a_folder_that_cannot_be_read_as_a_whole_is_refused(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    with pytest.raises(ConfigError, match="holds no documents: no file that ends in .txt"):
        read(folder)
    write(folder / "a.jsonl", "jsonl", ["a"])
    write(folder / "b.txt", "txt", ["b"])
    with pytest.raises(ConfigError, match=r"files of one kind.*it names \.jsonl, \.txt"):
        read(folder)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("form", [form for form in FORMS if form != "parquet"])
def test_a_byte_order_mark_is_no_text(tmp_path, form, streaming):
    for name in ("a", "b"):  # in each file, not in the first alone
        write(tmp_path / f"{name}.{form}", form, [f"{name} one", f"{name} two"], bom=b"\xef\xbb\xbf")
    assert read(tmp_path / f"*.{form}", streaming=streaming) == ["a one", "a two", "b one", "b two"]
    assert read(tmp_path / f"a.{form}", streaming=streaming) == ["a one", "a two"]


@pytest.mark.parametrize("streaming", [False, True])
def test_line_ends_of_every_system(tmp_path, streaming):
    (tmp_path / "d.txt").write_bytes("two\r\nfour\rso\u2028it\n\nend".encode())
    assert read(tmp_path / "d.txt", streaming=streaming) == ["two", "four", "so\u2028it", "end"]


def test_a_stream_of_an_older_checkpoint_goes_on(tmp_path):
    """The rows that were read are counted: what the library's own reader noted beside is not needed."""
    path = write(tmp_path / "d.jsonl", "jsonl", [f"doc {i}" for i in range(2 * CHUNK + 5)])
    data = DataConfig(path=path, streaming=True)
    whole, other = DocumentStream(data, TOKENIZER), DocumentStream(data, TOKENIZER)
    whole.take(CHUNK + 3)
    state = whole.state_dict()
    state["cursor"]["state"] = {
        "examples_iterable": {"shard_idx": 0, "shard_example_idx": CHUNK, "type": "Arrow"}
    }
    other.load_state_dict(json.loads(json.dumps(state)))
    assert other.take(CHUNK) == whole.take(CHUNK)


def test_two_formats_of_tables_beside_each_other(tmp_path):
    write(tmp_path / "a.csv", "csv", ["one, two"])
    write(tmp_path / "b.tsv", "tsv", ["three"])
    assert read(tmp_path / "*.?sv") == ["one, two", "three"]
