"""RLPT: segments, both tasks and their arms, written predictions, its reduction to RLP, and resume within
a document.
"""

from __future__ import annotations

import shutil

import pytest

from rlpretrain.config import ConfigError
from rlpretrain.config.io import build
from rlpretrain.training.loop import train
from rlpretrain.training.run import Run
from tests.builders.rlpt import BPE, TEXT, document, drawn, ids, rlpt, said, sentences
from tests.builders.runs import merged, one_step, same, trained


def test_segments_are_sentences_and_leave_nothing_out():
    found = rlpt().segments(document().token_ids)
    texts = [BPE.decode(document().token_ids[a:b]).strip() for a, b in found]
    assert texts == [
        "Dr. Smith has six cats.",
        "He went home at noon!",
        "Was it late?",
        "No, 3.5 hours were left.",
        "The cats slept.",
        "漢字を読む。",
        "End.",
    ]
    assert found[0][0] == 0 and found[-1][1] == len(ids(TEXT))
    assert all(b == c for (_, b), (c, _) in zip(found, found[1:], strict=False))


def test_targets_are_inner_segments_and_some_are_seen_from_both_sides():
    objective = rlpt(msr_weight=1.0, target_length=5)
    positions = [p for seed in range(40) for p in drawn(objective, seed=seed)]
    tokens = document().token_ids
    segments = dict(objective.segments(tokens))
    assert {p.index for p in positions} == set(list(segments)[1:-1])
    both = [p for p in positions if p.suffix_ids]
    assert 0.35 < len(both) / len(positions) < 0.65
    for p in positions:
        assert (
            p.context_ids == tokens[: p.index]
            and p.target_ids == tokens[p.index : min(segments[p.index], p.index + 5)]
        )
        if p.suffix_ids:
            assert p.suffix_ids == tokens[segments[p.index] : segments[segments[p.index]]]
    assert all(not p.suffix_ids for p in drawn(rlpt(msr_weight=0.0)))
    assert all(len(p.target_ids) >= 6 for p in drawn(rlpt(min_segment_tokens=6)))
    assert len(drawn(rlpt(positions_per_document=2))) == 2
    assert drawn(rlpt(), document("One sentence only.")) == drawn(rlpt(), document("One. Two.")) == []


def test_both_arms_of_a_middle_segment_see_what_follows_it():
    objective = rlpt(msr_weight=1.0, msr_template="Fill: {context}")
    position = next(p for seed in range(9) for p in drawn(objective, seed=seed) if p.suffix_ids)
    text = BPE.decode(objective.prompt(position).token_ids)
    context, after = BPE.decode(position.context_ids), BPE.decode(position.suffix_ids)
    assert text == f"Fill: {context}<MASK>{after}<think>"
    assert BPE.decode(objective.no_think(position)) == f"Fill: {context}<MASK>{after}"
    alone = next(p for p in drawn(rlpt(msr_weight=0.0)))
    prompt = BPE.decode(objective.prompt(alone).token_ids)
    assert objective.no_think(alone) is None and prompt == BPE.decode(alone.context_ids) + "<think>"


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("<|startofprediction|>He went home at noon!<|endofprediction|>", True),
        ("<|startofprediction|> He  went home <|endofprediction|>", True),  # a prefix, white space aside
        (
            "<|startofprediction|>He went home at noon! Was it late?<|endofprediction|>",
            True,
        ),  # more than the segment
        ("<|startofprediction|>He went<|endofprediction|>", False),  # too little to mean anything
        ("<|startofprediction|><|endofprediction|>", False),
        ("He went home at noon!", False),
        ("", False),
        ("<|startofprediction|>He went home at night<|endofprediction|>", False),
        ("<|startofprediction|>Dr. Smith has six cats.<|endofprediction|>", False),  # a copy of the context
        ("<|startofprediction|>He went home at noon!", False),  # never ended
        (
            "<|startofprediction|>He went home<|endofprediction|> <|startofprediction|>no no "
            "no<|endofprediction|>",
            False,
        ),  # the last
    ],
)
def test_written_predictions(text, right):
    objective = rlpt(reward="match", msr_weight=0.0)
    position = drawn(objective)[0]
    assert objective.needs == frozenset() and BPE.decode(position.target_ids).strip().startswith(
        "He went home"
    )
    assert objective.right(said(text), position) == right


def test_a_middle_segment_ends_where_it_ends():
    objective = rlpt(reward="match", msr_weight=1e9)
    position = next(
        p for p in drawn(objective) if p.suffix_ids and BPE.decode(p.target_ids).strip().startswith("He")
    )
    assert objective.right(said("<|startofprediction|>He went home at noon!<|endofprediction|>"), position)
    assert not objective.right(
        said("<|startofprediction|>He went home at noon! Was it<|endofprediction|>"), position
    )


def test_one_token_without_a_template_is_rlp(values, tmp_path):
    here = {"positions": "after", "marker": "shows", "target_length": 1}
    _, rlp = one_step(values, objective={"name": "rlp", **here})
    segments = {"name": "rlpt", "segments": "tokens", "msr_weight": 0.0, **here}
    _, ours = one_step(values, objective=segments, output_dir=str(tmp_path / "b"))
    assert same(rlp, ours)


@pytest.mark.parametrize("reward", ["information_gain", "match"])
def test_runs_over_sentences(values, tmp_path, reward):
    objective = {
        "name": "rlpt",
        "reward": reward,
        "msr_weight": 1.0,
        "msr_template": "{context}",
        "mask": "hmm",
        "opening": "has",
        "closing": ".",
        "min_words": 1,
        "positions_per_document": 2,
    }
    run = Run(
        build(merged(values, objective=objective, data=sentences(values, tmp_path), positions_per_step=8)),
        None,
    )
    batch = run.next_batch()
    assert len(batch.groups) == 8 and any(g.position.suffix_ids for g in batch.groups)
    micros = run.pack(batch, run.count(batch))
    for micro in micros:
        for b, group in enumerate(micro.groups):
            size = len(group.position.target_ids) if reward == "information_gain" else 0
            assert int(micro.target_mask[b].sum()) == size
    train(run)
    run.close()
    assert run.step == 3


def test_resume_keeps_the_task_of_positions_that_were_drawn(values, tmp_path):
    """More positions in a document than a step takes: those left over keep their segment and what follows
    it.
    """
    objective = {
        "name": "rlpt",
        "msr_weight": 1.0,
        "msr_template": "{context}",
        "mask": "hmm",
        "positions_per_document": 2,
    }
    changes = {
        "objective": objective,
        "data": sentences(values, tmp_path),
        "positions_per_step": 3,
        "max_steps": 6,
        "checkpoint__every": 3,
        "checkpoint__keep": 9,
    }
    whole = trained(values, output_dir=str(tmp_path / "a"), **changes)

    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "b" / "checkpoint-6")
    assert same(whole, trained(values, resume="auto", output_dir=str(tmp_path / "b"), **changes))


def test_bad_settings():
    with pytest.raises(ConfigError, match="has no middle segments"):
        rlpt(segments="tokens")
