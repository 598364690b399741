"""Document sources of a user's own, and `Objective.prepare`: order, ranks, resume, and what is refused."""

from __future__ import annotations

import json
import shutil
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rlpretrain.config import ConfigError, DataConfig
from rlpretrain.config.io import build
from rlpretrain.corpora import dial
from rlpretrain.data.document_source import SourceInputs, count_documents, take_documents
from rlpretrain.data.stream import DocumentStream, open_source, read_all
from rlpretrain.rollouts import drawing
from rlpretrain.tools.dry_run import dry_run
from rlpretrain.training.loop import train
from rlpretrain.training.run import Run
from rollout.store import Store
from rollout.types import Document
from tests.builders.runs import launch, merged, same, trained, weights

LINES = "tests.builders.sources:Lines"
TOKENIZER = dial.tokenizer()
NTP = {"name": "tests.builders.sources:LabelledNTP"}


def labelled(values):
    return {**values["objective"], "name": "tests.builders.sources:LabelledRLP"}


def mixture(corpus):
    sections = {
        "lines": {"path": str(corpus / "train.jsonl"), "max_length": 64, "source": LINES},
        "text": {"path": str(corpus / "base.jsonl"), "max_length": 64},
    }
    options = {"sources": sections, "weights": {"lines": [1.0, 0.0], "text": [0.0, 1.0]}}
    return {"source": "tests.builders.sources:Mixture", "options": options, "max_length": 64}


def data_of(corpus, kind):
    if kind == "mixture":
        return mixture(corpus)
    return {"source": f"tests.builders.sources:{kind}", "path": str(corpus / "train.jsonl"), "max_length": 64}


def opened(corpus, kind, **where):
    config = DataConfig(**data_of(corpus, kind))
    return open_source(SourceInputs(config=config, tokenizer=TOKENIZER, seed=3, **where))


def stored(folder):
    """The documents of each step of a run that kept its rollouts."""
    store = Store(folder / "rollouts")
    return [store.read(step)[1] for step in store.steps()]


# The order of documents


def test_the_built_in_stream_is_what_is_opened_by_default(corpus):
    data = DataConfig(path=str(corpus / "train.jsonl"))
    source = open_source(SourceInputs(config=data, tokenizer=TOKENIZER, seed=3))
    assert source.take(9, 0.5) == DocumentStream(data, TOKENIZER, seed=3).take(9)
    assert count_documents(source) == 200
    assert (
        count_documents(open_source(SourceInputs(config=replace(data, streaming=True), tokenizer=TOKENIZER)))
        is None
    )


@pytest.mark.parametrize("kind", ["Lines", "mixture"])
def test_two_ranks_share_out_the_order_of_one(corpus, kind):
    one = opened(corpus, kind)
    ranks = [opened(corpus, kind, rank=rank, world_size=2) for rank in range(2)]
    for step in range(40):
        parts = [rank.take(3, step / 40) for rank in ranks]
        assert [document for pair in zip(*parts, strict=True) for document in pair] == one.take(6, step / 40)


@pytest.mark.parametrize("kind", ["Lines", "mixture"])
def test_a_source_continues_where_its_state_was_taken(corpus, kind):
    whole, resumed = opened(corpus, kind), opened(corpus, kind)
    for step in range(12):
        resumed.take(5, 0.9)  # what it did before does not matter
        resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
        assert resumed.take(7, step / 12) == whole.take(7, step / 12)


def test_the_weights_of_a_mixture_follow_the_progress(corpus):
    source = opened(corpus, "mixture")
    shares = []
    for progress in (0.0, 0.5, 1.0):
        ids = [document.id for document in source.take(200, progress)]
        shares.append(sum(name.startswith("text") for name in ids) / 200)
    assert shares[0] == 0 and 0.35 < shares[1] < 0.65 and shares[2] == 1


# Runs


@pytest.mark.parametrize("objective", ["rlp", "ntp"])
@pytest.mark.parametrize("kind", ["Lines", "mixture"])
def test_a_run_resumes_bit_identically(values, corpus, tmp_path, kind, objective):
    changes = {
        "data": data_of(corpus, kind),
        "objective": labelled(values) if objective == "rlp" else NTP,
        "max_steps": 4,
        "checkpoint": {"every": 2, "keep": 3},
        "save_rollouts": True,
    }
    whole = trained(values, **changes)
    folder = Path(values["output_dir"])
    part = Path(shutil.copytree(folder, tmp_path / "part"))
    shutil.rmtree(part / "checkpoint-4")
    assert same(whole, trained(values, resume="auto", **changes | {"output_dir": str(part)}))
    assert stored(part) == stored(folder)
    for document in [document for step in stored(folder) for document in step]:
        assert document.scores is not None and len(document.scores) == len(document.token_ids)
        assert TOKENIZER.decode(document.token_ids[:1]) in ("hmm", "well")
    row = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["run/documents_without_position"] > 0  # those that `prepare` dropped


def test_two_ranks_train_on_what_one_rank_trains_on(values, corpus, tmp_path):
    """The same documents, prepared in the same way, whatever the number of ranks."""
    settings = {"data": data_of(corpus, "Lines"), "max_steps": 3, "save_rollouts": True}
    kinds = {"rlp": values["objective"], "ntp": {"name": "ntp"}}
    runs = [
        {"config": merged(values, **settings, objective=objective, output_dir=str(tmp_path / f"two {name}"))}
        for name, objective in kinds.items()
    ]
    launch(runs, tmp_path)
    for name, objective in kinds.items():
        one = trained(values, **settings, objective=objective, output_dir=str(tmp_path / f"one {name}"))
        assert same(one, weights(tmp_path / f"two {name}" / "model"), 1e-5)
        ranks = [Store(tmp_path / f"two {name}" / "rollouts", rank) for rank in range(2)]
        for step, documents in enumerate(stored(tmp_path / f"one {name}"), 1):
            both = [store.read(step)[1] for store in ranks]
            assert sorted(d.id for part in both for d in part) == sorted(d.id for d in documents)


def test_draws_of_two_ranks_are_prepared_as_those_of_one(corpus):
    """What `prepare` does with a draw depends on its number alone, whichever rank has it."""
    from tests.builders.sources import LabelledNTP

    objective = LabelledNTP(None, TOKENIZER)

    def draws(rank, size):
        source = opened(corpus, "Lines", rank=rank, world_size=size)
        taken = drawing.DocumentDraws(source, seed=3, rank=rank, size=size).take(60 // size, objective)
        return {draw.number: draw.document for draw in taken}

    assert draws(0, 1) == draws(0, 2) | draws(1, 2)
    assert 20 < len(draws(0, 1)) < 55


def test_a_document_may_be_prepared_in_two_ways_for_one_batch(values, tmp_path):
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps({"text": "ann has 1 . bob shows 1 ."}) + "\n")
    changes = {"data": {"path": str(path), "max_length": 64}, "objective": labelled(values)}
    run = Run(build(merged(values, **changes, positions_per_step=16)), None)
    documents = run.next_batch().documents
    run.close()
    assert len(documents) == 16 and len({d.id for d in documents}) == 2
    assert len({d.token_ids for d in documents}) == 2


def test_documents_of_ntp_data_are_prepared_too(values, corpus, tmp_path):
    """And a stream of them, which has no length, is kept in checkpoints."""
    changes = {
        "objective": labelled(values),
        "ntp_data": {"path": str(corpus / "base.jsonl"), "max_length": 64, "streaming": True},
        "max_steps": 4,
        "checkpoint": {"every": 2, "keep": 3},
        "save_rollouts": True,
    }
    whole = trained(values, **changes)
    folder = Path(values["output_dir"])
    assert all(d.id.startswith("ntp ") and d.scores for step in stored(folder) for d in step)
    part = Path(shutil.copytree(folder, tmp_path / "part"))
    shutil.rmtree(part / "checkpoint-4")
    assert same(whole, trained(values, resume="auto", **changes | {"output_dir": str(part)}))
    assert stored(part) == stored(folder)


def test_a_replay_trains_on_the_prepared_documents(values, corpus, tmp_path):
    changes = {"data": data_of(corpus, "Lines"), "objective": labelled(values)}
    first = trained(values, **changes, save_rollouts=True)
    again = trained(values, **changes, replay=values["output_dir"], output_dir=str(tmp_path / "again"))
    assert same(first, again)


def test_held_out_documents_are_read_and_prepared_alike(values, corpus):
    changes = {"data": data_of(corpus, "Lines"), "objective": labelled(values)}
    evaluated = {"eval__data": str(corpus / "held_out.jsonl"), "eval__documents": 16, "max_steps": 1}
    trained(values, **changes, **evaluated)
    row = json.loads((Path(values["output_dir"]) / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["eval/no_think_loss"] > 0
    read = read_all(DataConfig(**data_of(corpus, "Lines")), TOKENIZER, limit=5)
    assert [document.id for document in read] == [f"line {k}" for k in range(1, 6)]


def test_epochs_of_a_source_with_a_length(values, corpus, tmp_path, capsys):
    changes = {"data": data_of(corpus, "Lines"), "max_steps": None, "epochs": 0.1}
    config = build(merged(values, **changes))
    run = Run(config, None)
    run.close()
    assert run.total_steps == 5  # 20 of 200 documents, 4 a step
    assert dry_run(replace(config, output_dir=str(tmp_path / "other")), tmp_path) == 0
    out = capsys.readouterr().out
    assert "steps" in out and "200: " in out


# What is refused


def refuse(values, match, **changes):
    with pytest.raises(ConfigError, match=match):
        run = Run(build(merged(values, **changes)), None)
        try:
            train(run)
        finally:
            run.close()


def test_a_source_without_a_length_needs_max_steps(values, corpus):
    changes = {"data": data_of(corpus, "Endless"), "max_steps": None}
    refuse(values, "give max_steps instead of epochs", **changes)
    with pytest.raises(ConfigError, match="give max_steps instead of epochs"):
        dry_run(build(merged(values, **changes, output_dir="no/such/run")), Path())


def test_a_source_without_one_pass_reads_no_held_out_documents(values, corpus):
    match = r"document source 'tests\.builders\.sources:Endless' has no one_pass\(\)"
    refuse(values, match, data=data_of(corpus, "Endless"), eval__data=str(corpus / "held_out.jsonl"))


@pytest.mark.parametrize(
    ("data", "match"),
    [
        ({}, "'path' is required, or a 'source' of your own"),
        ({"path": "x", "options": {"n": 1}}, "'options' are those of a 'source', which is not set"),
        ({"source": "lines"}, "data.source: no 'lines'"),
        (
            {"source": "tests.builders.sources:Nothing"},
            "data.source: 'tests.builders.sources:Nothing' cannot",
        ),
        ({"source": "tests.builders.sources:__doc__"}, "data.source: .* is a str, not a class or function"),
        ({"source": LINES, "path": "/no/file"}, f"data.source '{LINES}': FileNotFoundError: .*/no/file"),
    ],
)
def test_what_cannot_be_opened_is_refused_by_name(values, data, match):
    refuse(values, match, data=data)


class Broken:
    """A source that does one thing wrong."""

    epoch, dropped, longest = 0.0, 0, 64

    def __init__(self, inputs):
        self.fault = inputs.config.options["fault"]
        if self.fault == "longest":
            self.longest = 65
        if self.fault == "length":
            self.longest = 2

    def take(self, n, progress=0.0):
        documents = {
            "few": [Document("a", (1, 2, 3))] * (n - 1),
            "type": ["text"] * n,
            "scores": [Document("a", (1, 2, 3), scores=(1.0,))] * n,
            "short": [Document("a", (1,))] * n,
        }
        if self.fault == "ends":
            next(iter(()))
        return documents.get(self.fault, [Document("a", (1, 2, 3))] * n)

    def state_dict(self):
        return {"cursor": [0, {1, 2}]} if self.fault == "state" else {}

    def load_state_dict(self, state):
        pass


@pytest.mark.parametrize(
    ("fault", "match"),
    [
        ("few", r"take\(4\) gave 3 documents; a source is endless"),
        ("type", "document .*: a Document is expected, not a str"),
        ("scores", "document a: 1 scores for 3 tokens"),
        ("short", "document a: 1 tokens are too few"),
        ("ends", "StopIteration"),
        ("longest", "has documents of 65 tokens, but data.max_length is 64"),
        ("length", "document a: it has 3 tokens, `longest` is 2"),
        ("state", r"state_dict\(\)\['cursor'\]\[1\] is of type set, which a checkpoint cannot read back"),
    ],
)
def test_what_a_source_does_wrong_is_said_with_its_name(fault, match):
    config = DataConfig(source="tests.test_document_source:Broken", options={"fault": fault}, max_length=64)
    name = r"document source 'tests\.test_document_source:Broken'.*"
    with pytest.raises(ConfigError, match=name + match):
        take_documents(open_source(SourceInputs(config=config, tokenizer=TOKENIZER)), 4, 0.0)


def test_an_object_that_is_no_source(monkeypatch):
    module = types.ModuleType("half_a_source")
    module.make = lambda inputs: types.SimpleNamespace(take=1, epoch=0)
    monkeypatch.setitem(sys.modules, "half_a_source", module)
    with pytest.raises(ConfigError, match="has no state_dict, load_state_dict, longest, dropped"):
        open_source(SourceInputs(config=DataConfig(source="half_a_source:make"), tokenizer=TOKENIZER))


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("WrongScores", "WrongScores.prepare: document .*: .* scores for .* tokens"),
        ("TooLong", "TooLong.prepare makes documents longer: the model has 256 positions"),
        ("DropsAll", r"500 documents in a row gave no position: .*or its `prepare` drops it \(500\)"),
    ],
)
def test_what_prepare_does_wrong_is_said_with_its_name(values, monkeypatch, name, match):
    monkeypatch.setattr(drawing, "PATIENCE", 500)
    objective = {**values["objective"], "name": f"tests.builders.sources:{name}"}
    refuse(values, match, objective=objective)


def test_the_default_prepare_costs_nothing(corpus, monkeypatch):
    from rlpretrain.objectives import load_objective

    monkeypatch.setattr(drawing.np.random, "default_rng", lambda *_: pytest.fail("random numbers"))
    objective = load_objective(build({"model": "m", "data": "d"}), TOKENIZER)
    document = Document("a", (1, 2, 3))
    assert drawing.prepare_document(objective, document, (0, 1, 2)) is document


def test_scores_are_kept_on_disk_exactly(tmp_path):
    documents = [Document("a", (1, 2), scores=(0.1, -1e300)), Document("b", (1, 2))]
    Store(tmp_path).write(1, [], documents, {})
    assert Store(tmp_path).read(1)[1] == documents
    assert torch.tensor(documents[0].scores, dtype=torch.float64)[0] == 0.1
