"""Issue 15.4: documents travel whole: what is replayed or waits in a checkpoint equals what was drawn."""

from __future__ import annotations

import datetime
import json

import pytest
import torch
from datasets import Dataset

from rlpretrain.config import DataConfig
from rlpretrain.config.io import build
from rlpretrain.data.stream import read_all
from rlpretrain.training.run import Run
from tests.builders.runs import merged, same, trained
from tests.builders.tiny import word_tokenizer


def traces(folder):
    rows = [
        {"q": f"ann has {i} bob", "a": f"shows {i} .", "n": i, "day": datetime.datetime(2024, 1, i)}
        for i in range(1, 7)
    ]
    path = folder / "traces.parquet"
    Dataset.from_list(rows).to_parquet(str(path))
    return {
        "path": str(path),
        "column": "q",
        "answer_column": "a",
        "answer_join": " ",
        "meta_columns": ["n", "day"],
    }


MIXED = {"objective": {"name": "sft_mixed", "share": 0.5}, "positions_per_step": 8, "max_steps": 3}


def test_replaying_sft_mixed_trains_the_answers_only(values, tmp_path):
    run = merged(values, ntp_data=traces(tmp_path), **MIXED)
    first = trained(run, save_rollouts=True, output_dir=str(tmp_path / "first"))
    again = trained(run, replay=str(tmp_path / "first" / "rollouts"), output_dir=str(tmp_path / "again"))
    whole = trained(
        merged(run, ntp_data__answer_column=None, ntp_data__column="q"), output_dir=str(tmp_path / "whole")
    )
    assert same(first, again) and not same(first, whole)


def test_a_replayed_batch_equals_the_one_that_was_kept(values, tmp_path):
    run = Run(build(merged(values, ntp_data=traces(tmp_path), save_rollouts=True, **MIXED)), None)
    batch = run.next_batch()
    run.close()
    given = [d for d in batch.documents if d.id.startswith("ntp ")]
    assert len(given) == 4 and all(d.answer_at == 4 and d.meta["day"].day == d.meta["n"] for d in given)
    replayed = Run(
        build(
            merged(
                values,
                ntp_data=traces(tmp_path),
                replay=f"{values['output_dir']}/rollouts",
                output_dir=str(tmp_path / "again"),
                **MIXED | {"max_steps": 1},
            )
        ),
        None,
    )
    again = replayed.next_batch()
    assert again.groups == batch.groups and list(again.documents) == list(batch.documents)
    replayed.close()


def waiting(values, tmp_path):
    """A run whose checkpoint holds positions that wait, of documents with answers and other columns."""
    return merged(
        values,
        data=traces(tmp_path) | {"max_length": 64},
        positions_per_step=4,
        objective={"name": "rlp", "positions": "random", "positions_per_document": 3},
    )


def test_documents_that_wait_in_a_checkpoint_are_whole(values, tmp_path):
    config = waiting(values, tmp_path)
    run, other = (
        Run(build(merged(config, output_dir=str(tmp_path / name))), None) for name in ("one", "two")
    )
    run.next_batch()
    torch.save(run.source.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)  # as a checkpoint is read
    assert len(state["spare"]) == 8
    other.source.load_state_dict(state)
    expected, found = run.next_batch(), other.next_batch()
    assert found == expected and all(
        d.answer_at == 4 and d.meta["day"].day == d.meta["n"] for d in found.documents
    )
    for each in (run, other):
        each.close()


def test_an_older_checkpoint_still_loads(values, tmp_path):
    run = Run(build(waiting(values, tmp_path)), None)
    run.next_batch()
    state = run.source.state_dict()
    places = list(run.source._spare)
    state["spare"] = [
        (
            p.document.id,
            p.document.token_ids,
            p.document.source,
            p.position.index,
            p.seed,
            len(p.position.target_ids),
            p.position.suffix_ids,
        )
        for p in places
    ]
    run.source.load_state_dict(state)
    found = run.source._spare
    assert [(p.position, p.seed) for p in found] == [(p.position, p.seed) for p in places]
    assert [p.document.token_ids for p in found] == [p.document.token_ids for p in places]
    run.close()


@pytest.mark.parametrize("streaming", [False, True])
def test_a_column_may_have_the_name_of_the_boundary(tmp_path, streaming):
    tokenizer = word_tokenizer(["two", "three", "five"])
    (tmp_path / "d.jsonl").write_text(json.dumps({"q": "two three", "a": "five", "answer_at": "here"}) + "\n")
    data = DataConfig(
        path=str(tmp_path / "d.jsonl"),
        column="q",
        answer_column="a",
        answer_join=" ",
        meta_columns=("answer_at",),
        streaming=streaming,
    )
    (document,) = read_all(data, tokenizer)
    assert document.meta == {"answer_at": "here"} and document.answer_at == 2
