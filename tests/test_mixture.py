"""Named sources of documents: their order, their weights over time, ranks, resume, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlpretrain import cli
from rlpretrain.config import ConfigError, DataConfig
from rlpretrain.config.io import build, load_config, parse, to_dict
from rlpretrain.corpora import dial
from rlpretrain.data.document_source import SourceInputs
from rlpretrain.data.source_order import SourceOrder
from rlpretrain.data.stream import DocumentStream, open_source
from rlpretrain.tools.dry_run import dry_run
from rlpretrain.training.loop import train
from rlpretrain.training.run import Run
from rollout.store import Store
from tests.builders.runs import launch, merged, same, trained, weights
from tests.builders.tiny import word_tokenizer

WORDS = ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k", "l", "m", "n"]
TOKENIZER = word_tokenizer(WORDS)
DIAL = dial.tokenizer()


def write_texts(file: Path, rows: int, words: int) -> Path:
    """Texts of `words` words; one token each, and the end of text."""
    texts = [" ".join(WORDS[(row + k) % len(WORDS)] for k in range(words)) for row in range(rows)]
    file.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return file


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    sizes = {"web": (5000, 5), "math": (3, 14), "notes": (400, 8)}
    return {name: write_texts(folder / f"{name}.jsonl", *size) for name, size in sizes.items()}


def sources_of(files, weights, **more):
    return {
        name: {"path": str(files[name]), "weight": w, **more.get(name, {})} for name, w in weights.items()
    }


def opened(sources, rank=0, world_size=1, tokenizer=TOKENIZER, per_step=12, seed=3, **fields):
    data = parse(DataConfig, {"sources": sources, **fields}, "data")
    place = {"rank": rank, "world_size": world_size, "seed": seed, "per_step": per_step}
    return open_source(SourceInputs(config=data, tokenizer=tokenizer, **place))


def ids(documents):
    return [document.id for document in documents]


def rows_of(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def stored(folder):
    store = Store(Path(folder) / "rollouts")
    return [store.read(step)[1] for step in store.steps()]


# The order


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(0.001, 1), min_size=1, max_size=5),
    st.lists(st.tuples(st.integers(1, 40), st.integers(0, 5)), max_size=6),
    st.integers(1, 30),
    st.integers(0, 2**31),
)
def test_every_source_has_its_share_at_all_times(shares, changes, block, seed):
    """The count of a source stays within a block of the sum of its shares, however often these change."""
    names = [f"s{k}" for k in range(len(shares))]
    order = SourceOrder(names, block=block, seed=seed)
    now = dict(zip(names, shares, strict=True))
    owed = dict.fromkeys(names, 0.0)
    for draws, turn in [(0, 0), *changes, (50, 0)]:
        now = {name: now[names[(k + turn) % len(names)]] for k, name in enumerate(names)}
        order.set_shares(now, order.position)
        for _ in range(draws):
            name, number = order.next_draw()
            assert order.counts[name] == number + 1
        for name in names:
            owed[name] += draws * now[name] / sum(now.values())
    assert sum(order.counts.values()) == order.position
    for name in names:
        assert abs(order.counts[name] - owed[name]) <= block + 1


def test_the_order_does_not_depend_on_that_of_the_names_or_on_sources_without_weight():
    def draws(shares):
        order = SourceOrder(list(shares), block=7, seed=1)
        order.set_shares(shares, 0)
        return [order.next_draw() for _ in range(200)]

    assert draws({"a": 0.7, "b": 0.3}) == draws({"b": 0.3, "x": 0.0, "a": 0.7})


def test_shares_change_only_where_no_draw_was_made():
    order = SourceOrder(["a", "b"], block=4, seed=0)
    order.set_shares({"a": 1.0}, 0)
    order.set_shares({"b": 1.0}, 10)  # 6 draws ahead, as if another rank were there already
    assert [order.next_draw()[0] for _ in range(15)] == ["a"] * 10 + ["b"] * 5
    with pytest.raises(ValueError, match="draw 3 is over"):
        order.set_shares({"a": 1.0}, 3)
    with pytest.raises(ValueError, match="are 0"):
        order.set_shares({"a": 0.0}, 20)


# Documents


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("count", ["tokens", "documents"])
def test_the_drawn_shares_are_the_weights(files, world_size, count):
    """A source of three documents beside one of thousands, over a ramp and a step; in what is counted."""
    weights = {"web": [[0, 0.9], [1, 0.3]], "math": 0.3, "notes": [[0, 0.0], [0.5, 0.0], [0.5, 0.4]]}
    ranks = [
        opened(sources_of(files, weights), rank, world_size, weights_count=count)
        for rank in range(world_size)
    ]
    drawn, expected = Counter(), Counter()
    for step in range(200):
        progress = step / 200
        documents = [d for rank in ranks for d in rank.take(12 // world_size, progress)]
        sizes = Counter()
        for document in documents:
            sizes[document.stream] += len(document.token_ids) if count == "tokens" else 1
        drawn += sizes
        present = {"web": 0.9 - 0.6 * progress, "math": 0.3, "notes": 0.4 * (progress >= 0.5)}
        for name, weight in present.items():
            expected[name] += weight / sum(present.values()) * sum(sizes.values())
    total = sum(drawn.values())
    for name in weights:
        assert abs(drawn[name] - expected[name]) / total < 0.01


def test_three_ranks_share_out_the_order_of_one(files):
    weights = {
        "web": [[0, 0.9], [1, 0.2]],
        "math": [[0, 0.1], [1, 0.3]],
        "notes": [[0, 0], [0.5, 0], [0.5, 1]],
    }
    streaming = {"notes": {"streaming": True}}
    one = opened(sources_of(files, weights, **streaming))
    three = [opened(sources_of(files, weights, **streaming), rank, 3) for rank in range(3)]
    for step in range(40):
        parts = [rank.take(5, step / 40) for rank in three]
        assert [d for triple in zip(*parts, strict=True) for d in triple] == one.take(15, step / 40)


def test_the_draws_of_a_source_do_not_depend_on_the_others(files):
    def web(weights, n):
        return [d for d in opened(sources_of(files, weights)).take(n, 0.3) if d.stream == "web"]

    alone = web({"web": 1.0}, 300)
    beside = web({"web": 0.2, "math": 0.5, "notes": 0.3}, 900)
    assert beside == alone[: len(beside)] and len(beside) > 150
    assert ids(opened(sources_of(files, {"web": 0.5, "math": 0.5})).take(90, 0.1)) == ids(
        opened(sources_of(files, {"web": 0.5, "math": 0.5, "notes": 0})).take(90, 0.1)
    )


def test_a_source_named_data_is_drawn_as_data_alone_is(files):
    mixed = opened({"data": {"path": str(files["web"])}}).take(70)
    plain = DocumentStream(DataConfig(path=str(files["web"])), TOKENIZER, seed=3).take(70)
    assert [d.token_ids for d in mixed] == [d.token_ids for d in plain]
    assert ids(mixed) == [f"data/{d.id}" for d in plain]


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_mixture_continues_where_its_state_was_taken(files, world_size):
    weights = {"web": [[0, 1], [1, 0.1]], "math": 0.4, "notes": [[0.2, 0], [0.3, 1]]}
    more = {"notes": {"streaming": True}, "math": {"exhausted": "renormalise", "passes": 9}}
    place = {"rank": world_size - 1, "world_size": world_size}
    whole, resumed = (opened(sources_of(files, weights, **more), **place) for _ in range(2))
    for step in range(12):
        resumed.take(5, 0.9)  # what it did before does not matter
        resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
        assert resumed.take(7, step / 12) == whole.take(7, step / 12)
    with pytest.raises(ConfigError, match="belongs to the sources math, notes, web"):
        opened(sources_of(files, {"web": 1})).load_state_dict(whole.state_dict())


def test_an_exhausted_source_leaves_its_share_to_the_others(files):
    more = {"math": {"exhausted": "renormalise", "passes": 2}}
    mixture = opened(sources_of(files, {"web": 2, "notes": 1, "math": 3}, **more), weights_count="documents")
    streams = Counter(d.stream for d in mixture.take(600))
    assert streams["math"] == 6 and mixture.exhausted is None
    assert abs(streams["web"] - 2 * streams["notes"]) <= 24
    endless = opened(sources_of(files, {"math": 1, "web": 1}, math={"exhausted": "stop"}))
    endless.take(2)
    assert endless.exhausted is None
    endless.take(200)
    assert endless.exhausted == "exhausted: source 'math' has no documents left (1 pass)"


def test_documents_come_in_the_order_of_a_column(files, tmp_path):
    """A curriculum: ascending or descending; equal numbers in a new random order in each epoch."""
    rows = [{"text": f"{WORDS[k % 14]} {WORDS[k % 13]}", "quality": k % 3} for k in range(30)]
    file = tmp_path / "rated.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))

    def orders(order_by, **fields):
        data = DataConfig(path=str(file), order_by=order_by, **fields)
        stream = DocumentStream(data, TOKENIZER, seed=1)
        return [[int(document.id) for document in stream.take(30)] for _ in range(2)]

    first, second = orders("quality")
    assert [k % 3 for k in first] == [k % 3 for k in second] == [0] * 10 + [1] * 10 + [2] * 10
    assert first != second and sorted(first) == list(range(30))
    assert [k % 3 for k in orders("-quality")[0]] == [2] * 10 + [1] * 10 + [0] * 10
    assert orders("quality", shuffle=False)[0] == sorted(range(30), key=lambda k: (k % 3, k))
    with pytest.raises(ConfigError, match=r"rated.jsonl\[0\]: column 'text' of order_by holds 'a a'"):
        orders("text")
    with pytest.raises(ConfigError, match="grade"):
        orders("grade")
    with pytest.raises(ConfigError, match="a stream is not sorted"):
        parse(DataConfig, {"path": str(file), "order_by": "quality", "streaming": True}, "data")


# Runs


def dial_sources(corpus, **weights):
    """Two sources of dial's documents; `read` is only read."""
    return {
        "think": {"path": str(corpus / "train.jsonl"), "weight": weights.get("think", 1.0)},
        "read": {"path": str(corpus / "base.jsonl"), "weight": weights.get("read", 1.0), "use": "read"},
    }


def test_one_source_trains_as_data_alone_does(values, corpus, tmp_path):
    plain = trained(values, max_steps=3)
    sources = {"sources": {"data": {k: v for k, v in values["data"].items()}}}
    mixed = trained(values, max_steps=3, data=sources, output_dir=str(tmp_path / "mixed"))
    assert same(plain, mixed)


@pytest.mark.parametrize("objective", ["rlp", "ntp"])
def test_a_run_resumes_bit_identically_inside_a_ramp(values, corpus, tmp_path, objective):
    ramp = {"think": [[0, 1.0], [1, 0.2]], "read": [[0, 0.1], [1, 1.0]]}
    changes = {
        "data": {"sources": dial_sources(corpus, **ramp), "max_length": 64},
        "objective": values["objective"] if objective == "rlp" else "ntp",
        "max_steps": 6,
        "checkpoint": {"every": 3, "keep": 3},
        "save_rollouts": True,
    }
    whole = trained(values, **changes)
    folder = Path(values["output_dir"])
    part = Path(shutil.copytree(folder, tmp_path / "part"))
    shutil.rmtree(part / "checkpoint-6")
    assert same(whole, trained(values, resume="auto", **changes | {"output_dir": str(part)}))
    assert stored(part) == stored(folder)
    read = [sum(d.stream == "read" for d in step) / len(step) for step in stored(folder)]
    assert read[0] < 0.4 < read[-1]


@pytest.mark.slow
def test_two_ranks_train_on_what_one_rank_trains_on(values, corpus, tmp_path):
    """In every step of a ramp the same documents, to think in and to read, and nearly the same weights."""
    ramp = {"think": [[0, 1.0], [1, 0.5]], "read": [[0, 0.0], [1, 1.0]]}
    data = {"sources": dial_sources(corpus, **ramp), "max_length": 64}
    changes = {"data": data, "max_steps": 3, "save_rollouts": True}
    kinds = {"rlp": values["objective"], "ntp": "ntp"}
    runs = [
        {"config": merged(values, **changes, objective=objective, output_dir=str(tmp_path / f"two {name}"))}
        for name, objective in kinds.items()
    ]
    launch(runs, tmp_path)
    for name, objective in kinds.items():
        one, two = tmp_path / f"one {name}", tmp_path / f"two {name}"
        alone = trained(values, **changes, objective=objective, output_dir=str(one))
        ranks = [Store(two / "rollouts", rank) for rank in range(2)]
        for step, documents in enumerate(stored(one), 1):
            both = [document for store in ranks for document in store.read(step)[1]]
            assert sorted(ids(both)) == sorted(ids(documents))
        for ours, theirs in zip(rows_of(one), rows_of(two), strict=True):
            assert ours["ntp/loss"] == pytest.approx(theirs["ntp/loss"], rel=1e-6)
        assert same(alone, weights(two / "model"), 1e-4)  # AdamW makes steps of tiny gradients' rounding
        last = [rows_of(run)[-1] for run in (one, two)]
        counts = [[row[f"source/{source}/tokens"] for source in ("think", "read")] for row in last]
        assert counts[0] == counts[1] and counts[0][1] > 0


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_that_think_share_out_the_documents_to_read(corpus, world_size):
    """In every step of a ramp the same draws as on one rank, documents to read included."""

    def mixture(rank, size):
        sources = dial_sources(corpus, think=[[0, 1], [1, 0.3]], read=[[0, 0.2], [1, 2.0]])
        data = parse(DataConfig, {"sources": sources, "max_length": 64}, "data")
        place = {"rank": rank, "world_size": size, "seed": 5, "per_step": 12, "thinks": True}
        return open_source(SourceInputs(config=data, tokenizer=DIAL, **place))

    one, ranks = mixture(0, 1), [mixture(rank, world_size) for rank in range(world_size)]
    for step in range(30):
        one.begin(step / 30, one.position)
        first = max(rank.position for rank in ranks)
        for rank in ranks:
            rank.begin(step / 30, first)
        parts = [d for rank in ranks for d in rank.take_numbered(12 // world_size, step / 30)]
        assert sorted(parts, key=lambda d: d.number) == one.take_numbered(12, step / 30)


def test_documents_to_read_come_beside_those_to_think_in(values, corpus):
    """A step has its positions in `think`, and from `read` what its weight asks for; the log counts both."""
    data = {"sources": dial_sources(corpus, read=2.0), "max_length": 64, "weights_count": "documents"}
    run = Run(build(merged(values, data=data, max_steps=2)), None)
    batch = run.next_batch()
    names = {document.id: document.stream for document in batch.documents}
    thinking = {group.position.document_id for group in batch.groups}
    assert len(batch.groups) == values["positions_per_step"]
    assert thinking == {name for name, stream in names.items() if stream == "think"}
    assert len(names) > 2 * len(thinking)

    train(run)
    run.close()
    last = run.last
    assert last["source/read/documents"] > last["source/think/documents"] > 0
    losses = [last[f"source/{name}/loss"] for name in ("think", "read")]
    assert min(losses) < last["ntp/loss"] < max(losses)


def test_a_source_may_be_left_out_of_the_next_token_loss(values, corpus):
    sources = dial_sources(corpus)
    sources["think"]["next_token"] = False
    run = Run(build(merged(values, data={"sources": sources, "max_length": 64})), None)
    batch = run.next_batch()
    assert batch.groups and {document.stream for document in batch.documents} == {"read"}
    train(run)
    run.close()
    assert "source/read/loss" in run.last and "source/think/loss" not in run.last


def test_an_exhausted_source_ends_the_run(values, corpus, tmp_path):
    few = tmp_path / "few.jsonl"
    few.write_text("\n".join((corpus / "train.jsonl").read_text().splitlines()[:20]))
    sources = {"few": {"path": str(few), "exhausted": "stop", "passes": 2}}
    run = Run(build(merged(values, data={"sources": sources, "max_length": 64}, max_steps=50)), None)
    train(run)
    run.close()
    assert run.stopped == "exhausted: source 'few' has no documents left (2 passes)"
    assert run.step == 40 // values["positions_per_step"] + 1


def test_prepared_documents_keep_their_source(values, corpus):
    data = {"sources": dial_sources(corpus), "max_length": 64}
    objective = {**values["objective"], "name": "tests.builders.sources:Rebuilding"}
    run = Run(build(merged(values, data=data, objective=objective, max_steps=1)), None)
    train(run)
    run.close()
    assert run.last["source/read/loss"] > 0


@pytest.mark.parametrize("ahead", [0, 2])
def test_an_exhausted_run_is_resumed_to_the_same_step(values, corpus, tmp_path, ahead):
    few = tmp_path / "few.jsonl"
    few.write_text("\n".join((corpus / "train.jsonl").read_text().splitlines()[:20]))
    changes = {
        "data": {"sources": {"few": {"path": str(few), "exhausted": "stop", "passes": 2}}, "max_length": 64},
        "max_steps": 50,
        "checkpoint": {"every": 2, "keep": 20},
        "engine": {"max_staleness": ahead},
    }
    trained(values, **changes)
    folder = Path(values["output_dir"])
    steps = len(rows_of(folder))
    part = Path(shutil.copytree(folder, tmp_path / "part"))
    for step in range(steps - 1, steps + 1):
        shutil.rmtree(part / f"checkpoint-{step}", ignore_errors=True)
    trained(values, resume="auto", **changes | {"output_dir": str(part)})
    assert len(rows_of(part)) == steps
    assert rows_of(part)[-1]["source/few/documents"] == rows_of(folder)[-1]["source/few/documents"]


def test_held_out_files_of_sources_are_evaluated_apart(values, corpus):
    held_out = {name: str(corpus / "held_out.jsonl") for name in ("think", "read")}
    data = {"sources": dial_sources(corpus), "max_length": 64}
    trained(values, data=data, max_steps=1, eval={"data": held_out, "documents": 8, "thoughts": 2})
    row = rows_of(values["output_dir"])[-1]
    assert row["eval/no_think_loss"] == row["eval/think/no_think_loss"]  # where it thinks
    assert row["eval/read/no_think_loss"] > 0
    assert "eval/think/gain_frozen" in row and "eval/read/gain_frozen" not in row


def test_one_source_of_a_run_is_evaluated_later(values, corpus, tmp_path, capsys):
    """By its name, with its own fields: here its texts are in another column."""
    lines = (corpus / "held_out.jsonl").read_text().splitlines()
    renamed = tmp_path / "renamed.jsonl"
    renamed.write_text("\n".join(json.dumps({"words": json.loads(line)["text"]}) for line in lines))
    sources = {**dial_sources(corpus), "other": {"path": str(renamed), "column": "words", "weight": 0.1}}
    held_out = {"think": str(corpus / "held_out.jsonl"), "other": str(renamed)}
    changes = {"data": {"sources": sources, "max_length": 64}, "eval": {"data": held_out, "documents": 4}}
    trained(values, **changes, max_steps=1)

    def numbers(name):
        file = tmp_path / f"{name}.json"
        words = ["eval", values["output_dir"], "--data", name, "--documents", "4", "--thoughts", "1"]
        assert cli.main([*words, "--device", "cpu", "--json", str(file)]) == 0
        return json.loads(file.read_text())["all"]

    assert numbers("other")["no_think_loss"] == numbers("think")["no_think_loss"]
    assert cli.main(["eval", values["output_dir"]]) == 2
    assert "name one as --data: think, other" in capsys.readouterr().err
    page = tmp_path / "page.html"
    assert cli.main(["report", values["output_dir"], "--out", str(page)]) == 0
    assert "mean gain" in page.read_text()  # thoughts in held-out documents of `think`


def test_a_held_out_file_that_is_trained_on_is_named(values, corpus, tmp_path, capsys):
    copy = Path(shutil.copy(corpus / "train.jsonl", tmp_path / "copy.jsonl"))
    files = {"think": str(copy), "read": str(corpus / "held_out.jsonl")}
    data = {"sources": dial_sources(corpus), "max_length": 64}
    run = Run(build(merged(values, data=data, eval={"data": files}, console=True)), None)
    run.close()
    said = "".join(capsys.readouterr().out.split())  # the console breaks long paths
    assert f"eval.data.think{copy}isthetrainingfile{corpus / 'train.jsonl'}ofdata.sources.think" in said
    assert said.count("isthetrainingfile") == 1


def test_a_mixture_is_checked_before_a_run(values, corpus, tmp_path, capsys):
    config = build(merged(values, data={"sources": dial_sources(corpus), "max_length": 64}, max_steps=2))
    assert dry_run(config, tmp_path) == 0
    assert build(to_dict(config)) == config


@pytest.mark.parametrize("objective", ["rlp", "ntp"])
def test_a_dry_run_says_how_often_sources_are_read(values, corpus, tmp_path, capsys, objective):
    """What a run of so many steps then draws, with weights that change, to within a document a step."""
    data = {"sources": dial_sources(corpus, read=[[0.0, 0.0], [1.0, 3.0]]), "max_length": 64}
    run = merged(values, data=data, max_steps=12)
    run["objective"] = values["objective"] if objective == "rlp" else "ntp"
    assert dry_run(build(run), tmp_path) == 0
    said = re.findall(
        r"source (\w+) +│ about (\d+) documents of (\d+): ([\d.]+) passes", capsys.readouterr().out
    )
    held = Run(build(run), None)
    train(held)
    held.close()
    assert {name for name, *_ in said} == {"think", "read"}
    for name, documents, length, passes in said:
        assert abs(int(documents) - held.last[f"source/{name}/documents"]) <= 12, name
        assert float(passes) == pytest.approx(int(documents) / int(length), rel=0.01, abs=0.01)


# Bad input

WRONG = {
    "sum to 0 at progress 0.0": {"a": {"path": "x", "weight": 0}},
    "sum to 0 at progress 0.5": {"a": {"path": "x", "weight": [[0, 1], [0.5, 0]]}},
    "overlap: their progress must not fall": {"a": {"path": "x", "weight": [[0.5, 1], [0.2, 1]]}},
    "more than two points at one progress": {"a": {"path": "x", "weight": [[0.5, 1], [0.5, 2], [0.5, 3]]}},
    "'data.sources.a.weight': expected a number of at least 0": {"a": {"path": "x", "weight": -1}},
    "expected a number of at least 0, or points": {"a": {"path": "x", "weight": [[2, 1]]}},
    "unknown key 'data.sources.a.weigth': did you mean 'weight'": {"a": {"path": "x", "weigth": 1}},
    "'data.sources.a': 'path' is required": {"a": {"weight": 1}},
    "the source name 'a b' has other characters": {"a b": {"path": "x"}},
    "'passes' needs 'exhausted: stop' or": {"a": {"path": "x", "passes": 3}},
    "leaves no use for a source": {"a": {"path": "x", "use": "read", "next_token": False}},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_sources_are_refused(message):
    with pytest.raises(ConfigError) as error:
        build({"model": "m", "max_steps": 1, "data": {"sources": WRONG[message]}})
    assert message in str(error.value)


def test_sources_that_do_not_serve_the_run_are_refused(values, corpus, tmp_path):
    think, read = dial_sources(corpus).values()

    def refused(message, **changes):
        with pytest.raises(ConfigError, match=message):
            Run(build(merged(values, **changes)), None)

    refused("would teach nothing", data={"sources": {"t": think, "r": read}}, loss={"ntp_coef": 0.0})
    share = {"name": "sft_mixed", "share": 0.3}
    refused("objective.share", data={"sources": {"t": think, "r": read}}, objective=share)
    refused("nowhere to think", data={"sources": {"read": read}})
    late = {"think": think | {"weight": [[0, 0], [1, 1]]}, "read": read}
    refused("use: think sum to 0 at progress 0,", data={"sources": late})
    refused(
        "takes|has no other loss", data={"sources": {"t": think | {"next_token": False}}}, objective="ntp"
    )
    refused(
        "eval.data names 'u', which is none", data={"sources": {"t": think}}, eval={"data": {"u": "x.txt"}}
    )
    refused("ntp_data is one source", ntp_data={"sources": {"t": think}})
    refused("make it one of them", data={"sources": {"t": think}}, ntp_data=values["data"])
    refused("give max_steps", data={"sources": {"t": think}}, max_steps=None, epochs=1.0)
    refused("needs the number of its documents", data={"sources": {"t": think | STOPS}})
    refused("beside 'sources'", data={"sources": {"t": think}, "path": "x.jsonl"})
    missing = {"t": think, "u": {"path": str(tmp_path / "none.jsonl")}}
    refused(r"none\.jsonl", data={"sources": missing})
    column = {"t": think, "u": think | {"column": "question"}}
    refused("question", data={"sources": column})


STOPS = {"streaming": True, "exhausted": "stop"}


def test_sources_are_given_in_yaml_and_on_the_command_line(files, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(f"model: m\nmax_steps: 3\ndata: {{max_length: 99, sources: {{web: {files['web']}}}}}\n")
    config = load_config(file, ["--data.sources.web.weight", "[[0, 1], [0.5, 2]]"])
    assert config.data.sources["web"].weight == ((0.0, 1.0), (0.5, 2.0))
    assert config.data.sources["web"].max_length == config.data.max_length == 99
