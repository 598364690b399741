"""Documents: what is read, in which order, from which place on, and what is said about bad input."""

import json

import datasets
import huggingface_hub.constants
import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from tokenizers.processors import TemplateProcessing

from rlpretrain.config import ConfigError, DataConfig
from rlpretrain.data.stream import CHUNK, DocumentStream, read_all
from tests.builders.tiny import word_tokenizer

WORDS = [f"w{i}" for i in range(40)]
TOKENIZER = word_tokenizer(WORDS)
EOS = TOKENIZER.eos_token_id


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """A cache of `datasets` that dies with the test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "data"
    path.mkdir()
    return path


def texts(n, length=3):
    """n different texts; the first words count."""
    return [" ".join(WORDS[(i // 40**k) % 40] for k in range(length)) for i in range(n)]


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def words(document):
    return TOKENIZER.decode([t for t in document.token_ids if t != EOS])


# What is read


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "form", ["txt", "jsonl", "json", "csv", "tsv", "parquet", "glob", "folder", "disk", "gz"]
)
def test_every_form_gives_the_same_documents(folder, form, streaming):
    lines = texts(7)
    rows = Dataset.from_dict({"text": lines})
    path = str(folder / f"d.{form}")
    if form == "txt":
        (folder / "d.txt").write_text("\n".join(lines) + "\n")
    elif form == "jsonl":
        rows.to_json(path)
    elif form == "json":
        (folder / "d.json").write_text(json.dumps([{"text": line} for line in lines]))
    elif form in ("csv", "tsv"):
        rows.to_csv(path, sep="\t" if form == "tsv" else ",")
    elif form == "parquet":
        rows.to_parquet(path)
    elif form in ("glob", "folder"):
        jsonl(folder / "a.jsonl", rows.select(range(4)))
        jsonl(folder / "b.jsonl", rows.select(range(4, 7)))
        path = str(folder / "*.jsonl") if form == "glob" else str(folder)
    elif form == "disk":
        path = str(folder / "saved")
        rows.save_to_disk(path)
    elif form == "gz":
        import gzip

        path = str(folder / "d.txt.gz")
        with gzip.open(path, "wt") as file:
            file.write("\n".join(lines))
    documents = read_all(DataConfig(path=path, streaming=streaming), TOKENIZER)
    assert [words(d) for d in documents] == lines
    assert [d.id for d in documents] == [str(i) for i in range(7)]
    assert all(d.token_ids[-1] == EOS for d in documents)
    assert documents[2].source == (f"{path}:3" if form == "txt" else f"{path}[2]")


def test_saved_folder_stays_as_it_was_and_its_splits_are_listed(folder):
    path = folder / "saved"
    DatasetDict(train=Dataset.from_dict({"text": texts(3)})).save_to_disk(str(path))
    before = sorted(p.name for p in path.rglob("*"))
    assert len(read_all(DataConfig(path=str(path)), TOKENIZER)) == 3
    assert sorted(p.name for p in path.rglob("*")) == before
    with pytest.raises(ConfigError, match="no split 'test'; its splits: train"):
        read_all(DataConfig(path=str(path), split="test"), TOKENIZER)


@pytest.mark.parametrize("streaming", [False, True])
def test_meta_columns_and_another_text_column(folder, streaming):
    path = jsonl(folder / "d.jsonl", [{"q": t, "answer": i, "k": [i]} for i, t in enumerate(texts(5))])
    data = DataConfig(path=path, column="q", meta_columns=("answer", "k"), streaming=streaming)
    documents = DocumentStream(data, TOKENIZER, seed=3).take(5)
    assert all(d.meta == {"answer": int(d.id), "k": [int(d.id)]} for d in documents)


def test_local_file_is_whatever_split_is_asked_for(folder):
    (folder / "d.txt").write_text("\n".join(texts(10)))
    assert len(read_all(DataConfig(path=str(folder / "d.txt"), split="test"), TOKENIZER)) == 10
    part = read_all(DataConfig(path=str(folder / "d.txt"), split="train[50%:]"), TOKENIZER)
    assert [words(d) for d in part] == texts(10)[5:]
    assert part[0].source.endswith("d.txt[0]")  # not a line of the file


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("long", "lengths"), [("split", [[4, 4, 3], [3]]), ("truncate", [[4], [3]])])
def test_long_documents(folder, long, lengths, streaming):
    (folder / "d.txt").write_text("\n".join([" ".join(WORDS[:10]), "w1 w2"]))
    data = DataConfig(path=str(folder / "d.txt"), max_length=4, long=long, streaming=streaming)
    documents = read_all(data, TOKENIZER)
    assert [len(d.token_ids) for d in documents] == [n for row in lengths for n in row]
    assert [d.id for d in documents] == (["0.0", "0.1", "0.2", "1"] if long == "split" else ["0", "1"])
    first = [t for d in documents if d.id.startswith("0") for t in d.token_ids]
    whole = [*TOKENIZER.convert_tokens_to_ids(WORDS[:10]), EOS]
    assert first == (whole if long == "split" else whole[:4])


def test_bos_heads_every_piece_and_eos_is_not_doubled(folder):
    tokenizer = word_tokenizer(["<s>", *WORDS])
    tokenizer.bos_token = "<s>"
    bos = tokenizer.bos_token_id
    both = TemplateProcessing(single="<s> $A <eos>", special_tokens=[("<s>", bos), ("<eos>", EOS)])
    tokenizer.backend_tokenizer.post_processor = both
    (folder / "d.txt").write_text(" ".join(WORDS[:7]))
    documents = read_all(DataConfig(path=str(folder / "d.txt"), max_length=4), tokenizer)
    ids = tokenizer.convert_tokens_to_ids(WORDS[:7])
    assert [d.token_ids for d in documents] == [(bos, *ids[:3]), (bos, *ids[3:6]), (bos, ids[6], EOS)]


def test_without_eos(folder):
    (folder / "d.txt").write_text("w1 w2 w3")
    (document,) = read_all(DataConfig(path=str(folder / "d.txt"), append_eos=False), TOKENIZER)
    assert EOS not in document.token_ids


@pytest.mark.parametrize("streaming", [False, True])
def test_blank_and_short_documents_are_dropped_and_counted(folder, streaming):
    path = jsonl(folder / "d.jsonl", [{"text": t} for t in ["w1 w2 w3", "", None, "  ", "w4", "w5 w6 w7"]])
    stream = DocumentStream(
        DataConfig(path=path, streaming=streaming, shuffle=False), TOKENIZER, min_length=3
    )
    assert [d.id for d in stream.take(2)] == ["0", "5"]
    assert stream.dropped == 4


def test_changed_file_is_read_again(folder):
    path = folder / "d.txt"
    path.write_text("w1 w2\n")
    assert words(read_all(DataConfig(path=str(path)), TOKENIZER)[0]) == "w1 w2"
    path.write_text("w3 w4\n")
    assert words(read_all(DataConfig(path=str(path)), TOKENIZER)[0]) == "w3 w4"


def test_tokenised_once(folder, monkeypatch):
    (folder / "d.txt").write_text("\n".join(texts(5)))
    data = DataConfig(path=str(folder / "d.txt"))
    first = read_all(data, TOKENIZER)
    monkeypatch.setattr(
        "rlpretrain.data.tokenization.DocumentSplitter.split", lambda *_: pytest.fail("tokenised again")
    )
    assert read_all(data, TOKENIZER) == first


def test_limit(folder):
    (folder / "d.txt").write_text("\n".join(texts(5)))
    for streaming in (False, True):
        assert (
            len(read_all(DataConfig(path=str(folder / "d.txt"), streaming=streaming), TOKENIZER, limit=3))
            == 3
        )


def test_no_noise_and_settings_restored(folder, capfd):
    (folder / "d.txt").write_text("\n".join(texts(5)))
    datasets.enable_progress_bars()
    level = datasets.logging.get_verbosity()
    DocumentStream(DataConfig(path=str(folder / "d.txt")), TOKENIZER).take(7)
    captured = capfd.readouterr()
    assert not captured.out and not captured.err
    assert not datasets.are_progress_bars_disabled() and datasets.logging.get_verbosity() == level


# In which order


@pytest.fixture
def corpus(folder):
    """Several chunks of a stream, not a multiple of one."""
    (folder / "d.txt").write_text("\n".join(texts(2 * CHUNK + 9)))
    return str(folder / "d.txt")


def test_each_epoch_is_another_permutation_and_a_seed_decides_it(corpus):
    data = DataConfig(path=corpus)
    stream = DocumentStream(data, TOKENIZER, seed=1)
    n = len(stream)
    first, second = ([d.id for d in stream.take(n)] for _ in range(2))
    assert stream.epoch == 2
    assert sorted(first) == sorted(second) == sorted(map(str, range(n)))
    assert first != second
    assert [d.id for d in DocumentStream(data, TOKENIZER, seed=1).take(n)] == first
    assert [d.id for d in DocumentStream(data, TOKENIZER, seed=2).take(n)] != first


def test_unshuffled_order_is_the_files(corpus):
    stream = DocumentStream(DataConfig(path=corpus, shuffle=False), TOKENIZER)
    assert [int(d.id) for d in stream.take(len(stream) + 2)] == [*range(len(stream)), 0, 1]


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_together_see_what_one_rank_sees_step_by_step(corpus, world_size):
    data = DataConfig(path=corpus)
    one = DocumentStream(data, TOKENIZER, seed=5)
    ranks = [
        DocumentStream(data, TOKENIZER, seed=5, rank=r, world_size=world_size) for r in range(world_size)
    ]
    for step in range(30):  # over two epoch ends; their lengths are no multiple of anything here
        per_rank = 4 + step % 2
        together = [
            d for documents in zip(*(r.take(per_rank) for r in ranks), strict=True) for d in documents
        ]
        assert together == one.take(per_rank * world_size)


@pytest.mark.parametrize("world_size", [2, 3])
def test_streaming_ranks_share_each_pass(corpus, world_size):
    data = DataConfig(path=corpus, streaming=True)
    n = (2 * CHUNK + 9) // world_size
    one = DocumentStream(data, TOKENIZER).take(n * world_size)
    ranks = [
        DocumentStream(data, TOKENIZER, rank=r, world_size=world_size).take(n) for r in range(world_size)
    ]
    assert [d for documents in zip(*ranks, strict=True) for d in documents] == one


# From which place on


def copy(state):
    """As a checkpoint would keep it."""
    return json.loads(json.dumps(state))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (0, 2), (1, 2)])
def test_resumed_stream_goes_on_exactly(folder, streaming, rank, world_size):
    lines = texts(CHUNK + 30)
    for i in range(0, len(lines), 7):
        lines[i] = " ".join(WORDS[i % 20 : i % 20 + 15])  # several pieces
    lines[3] = lines[70] = ""
    (folder / "d.txt").write_text("\n".join(lines))
    data = DataConfig(path=str(folder / "d.txt"), max_length=6, streaming=streaming)

    def fresh():
        return DocumentStream(data, TOKENIZER, seed=4, rank=rank, world_size=world_size)

    expected = fresh().take(400)
    whole = fresh()
    start = 0
    for n in (
        0,
        1,
        2,
        7,
        50,
        40,
        60,
        33,
        129,
        64,
        1,
        0,
        5,
    ):  # inside documents, at chunk ends, over epoch ends
        assert whole.take(n) == expected[start : start + n]
        start += n
        resumed = fresh()
        resumed.take(3)  # what it did before does not matter
        resumed.load_state_dict(copy(whole.state_dict()))
        assert (resumed.epoch, resumed.dropped) == (whole.epoch, whole.dropped)
        assert resumed.take(400 - start) == expected[start:]


def test_every_stopping_place_of_a_stream(folder):
    path = folder / "d.jsonl"
    jsonl(path, [{"text": t} for t in texts(CHUNK + 3)])
    for world_size in (1, 2):
        data = DataConfig(path=str(path), streaming=True)
        whole = DocumentStream(data, TOKENIZER, world_size=world_size)
        resumed = DocumentStream(data, TOKENIZER, world_size=world_size)
        for _ in range(2 * CHUNK):
            resumed.load_state_dict(copy(whole.state_dict()))
            assert resumed.take(1) == whole.take(1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 9}, "seed was 0, is 9"),
        ({"world_size": 2}, "world_size was 1, is 2"),
        ({"max_length": 9}, "data.max_length was 2048, is 9"),
        ({"min_length": 3}, "min_length was 2, is 3"),
        ({"tokenizer": word_tokenizer(WORDS[::-1])}, "tokenizer was"),
    ],
)
def test_foreign_state_is_refused(corpus, change, said):
    state = DocumentStream(DataConfig(path=corpus), TOKENIZER).state_dict()
    change = dict(change)
    data = DataConfig(path=corpus, max_length=change.pop("max_length", 2048))
    other = DocumentStream(data, change.pop("tokenizer", TOKENIZER), **change)
    with pytest.raises(ConfigError, match=said):
        other.load_state_dict(state)


def test_state_of_a_file_that_changed_is_refused(folder):
    path = folder / "d.txt"
    path.write_text("\n".join(texts(5)))
    state = DocumentStream(DataConfig(path=str(path)), TOKENIZER).state_dict()
    path.write_text("\n".join(texts(6)))
    with pytest.raises(ConfigError, match="documents was 5, is 6"):
        DocumentStream(DataConfig(path=str(path)), TOKENIZER).load_state_dict(state)


# What is said about bad input


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("d.jsonl", None, r"no such file or folder: .*d\.jsonl"),
        ("d.jsonl", "", r"d\.jsonl is empty"),
        ("d.txt", "", r"d\.txt is empty"),
        ("d.csv", "text\n", r"d\.csv.*no (rows|data)"),
        ("d.jsonl", '{"text": "w1 w2"}\n\n{"text": "w1"\n', r"d\.jsonl:3: not JSON: .*w1"),
        ("d.jsonl", '{"text": "w1 w2"}\n[1]\n', r"d\.jsonl:2: not a JSON object"),
        ("d.json", '[{"text": "w1 w2"}, {]', r"cannot read .*d\.json"),
        ("d.txt", b"w1 w2\n\xff\xfe\n", r"d\.txt:2: not UTF-8"),
        ("d.parquet", "w1 w2", r"cannot read .*d\.parquet"),
        ("d.md", "w1 w2", r"d\.md must name files of one kind.*\.jsonl"),
        (
            "d.jsonl",
            '{"question": "w1", "answer": "w2"}\n',
            r"no column 'text'; its columns: question, answer",
        ),
        ("d.jsonl", '{"text": 3}\n', r"d\.jsonl\[0\]: column 'text' holds int, not text"),
        ("d.txt", "w1\n\nw2\n", r"no document has 4 tokens; 3 are blank or shorter"),
    ],
)
def test_bad_files(folder, name, content, said, streaming):
    path = folder / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=said):
        DocumentStream(DataConfig(path=str(path), streaming=streaming), TOKENIZER, min_length=4).take(1)


def test_bad_line_deep_inside_a_stream_has_its_number(folder):
    rows = "".join(json.dumps({"text": t}) + "\n" for t in texts(CHUNK + 5))
    (folder / "d.jsonl").write_text(rows + "{oops\n")
    with pytest.raises(ConfigError, match=rf"d\.jsonl:{CHUNK + 6}: not JSON"):
        DocumentStream(DataConfig(path=str(folder / "d.jsonl"), streaming=True), TOKENIZER).take(CHUNK + 6)


def test_missing_meta_column_split_and_glob(folder):
    (folder / "d.txt").write_text("w1 w2")
    with pytest.raises(ConfigError, match="no column 'answer'; its columns: text"):
        DocumentStream(DataConfig(path=str(folder / "d.txt"), meta_columns=("answer",)), TOKENIZER)
    with pytest.raises(ConfigError, match="no file matches"):
        DocumentStream(DataConfig(path=str(folder / "*.csv")), TOKENIZER)
    with pytest.raises(ConfigError, match='Unknown split "test"'):
        DocumentStream(DataConfig(path=str(folder), split="test"), TOKENIZER)


def test_hub_dataset_offline(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        ConfigError, match="'nobody/nothing' is not a local file or folder, and the hub cannot be reached"
    ):
        DocumentStream(DataConfig(path="nobody/nothing"), TOKENIZER)


def test_hub_dataset_that_does_not_exist(monkeypatch):
    def missing(*_, **__):
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'nobody/nothing' doesn't exist on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", missing)
    with pytest.raises(
        ConfigError, match="'nobody/nothing' is neither a local file or folder nor a dataset on the hub"
    ):
        DocumentStream(DataConfig(path="nobody/nothing"), TOKENIZER)


def test_bad_arguments(corpus):
    with pytest.raises(ValueError, match="rank 2 is not one of 2"):
        DocumentStream(DataConfig(path=corpus), TOKENIZER, rank=2, world_size=2)
    with pytest.raises(ConfigError, match="max_length is 3; a document needs 5"):
        DocumentStream(DataConfig(path=corpus, max_length=3), TOKENIZER, min_length=5)
    with pytest.raises(TypeError, match="no known length"):
        len(DocumentStream(DataConfig(path=corpus, streaming=True), TOKENIZER))


def test_more_ranks_than_rows(folder):
    (folder / "d.txt").write_text("w1 w2\n")
    data = DataConfig(path=str(folder / "d.txt"))
    assert DocumentStream(data, TOKENIZER, rank=1, world_size=2).take(2) == read_all(data, TOKENIZER) * 2
    stream = DocumentStream(DataConfig(path=data.path, streaming=True), TOKENIZER, rank=1, world_size=2)
    with pytest.raises(ConfigError, match="fewer rows than ranks"):
        stream.take(1)


def test_token_ids_are_plain_ints(corpus):
    (document,) = DocumentStream(DataConfig(path=corpus), TOKENIZER).take(1)
    assert all(type(t) is int for t in document.token_ids) and not isinstance(document.id, np.generic)
