"""RPT: truth in bytes against a slow reference, predictions from boxes, rewards, and real runs."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlpretrain.config.io import build
from rlpretrain.objectives import Setting, find
from rlpretrain.objectives.rpt import RPT, Config
from rlpretrain.training.loop import train
from rlpretrain.training.run import Run
from rlpretrain.types import Document
from rollout.types import FinishReason, Group, Position, Prompt, SamplingParams, Thought
from tests.builders.rpt import BPE, CLOSE, OPEN, Scripted, ids
from tests.builders.runs import merged, one_step
from tests.builders.tiny import word_tokenizer


def rpt(tokenizer=BPE, **fields) -> RPT:
    objective = RPT(Config(template="raw", **fields), tokenizer)
    objective.setting = Setting(SamplingParams(max_thought_tokens=8), 2, 0.0)
    return objective


def split(text: str, at: int, window: int = 8) -> Position:
    """A position at token `at` of a text."""
    tokens = ids(text)
    return Position("d", at, tokens[:at], tokens[at : at + window])


def raw(tokens) -> bytes:
    """The bytes of byte-level tokens, by the table that GPT-2 made (printable bytes are themselves, the
    others 256 and up).
    """
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(b): b for b in plain} | {
        chr(256 + k): b for k, b in enumerate(b for b in range(256) if b not in plain)
    }
    return b"".join(bytes(table[c] for c in BPE.convert_ids_to_tokens(t)) for t in tokens)


texts = st.text(alphabet="the cat.漢字é🙂 {}", min_size=2, max_size=24)


@settings(max_examples=200, deadline=None)
@given(texts, st.integers(1, 30), st.integers(1, 8))
def test_truth_is_that_of_the_tokens_bytes(text, at, window):
    at = min(at, len(ids(text)) - 1)
    if at < 1:
        return
    position = split(text, at, window)
    truth, ends = rpt().truth(position)
    before, whole = raw(position.context_ids), raw(position.target_ids)
    clean = []  # lengths at which no character is cut, there being none before
    for n in range(1, len(position.target_ids) + 1):
        part = raw(position.target_ids[:n])
        try:
            before.decode(), part.decode()
            clean.append(len(part))
        except UnicodeDecodeError:
            pass
    assert ends == clean
    for end in ends:
        assert truth[:end] == whole[:end]


def test_hand_worked_positions():
    text = "the cat 漢"
    pieces = [raw([t]) for t in ids(text)]
    assert (
        b"".join(pieces) == text.encode() and len(pieces[-1]) == 1
    )  # the character is split over several tokens
    first = len(pieces) - 3
    objective = rpt()
    assert objective.truth(split(text, first + 1))[1] == []  # the context ends within a character
    truth, ends = objective.truth(split(text, first))
    assert truth == "漢".encode() and ends == [
        3
    ]  # only all of its tokens together end where a character does
    truth, ends = objective.truth(split("the cat sat", 1))
    assert truth.startswith(b" ") and ends[0] >= 2  # leading spaces belong to their tokens


def test_a_byte_that_is_no_character_is_none():
    assert rpt(strip=True).truth(split("the cat", 1))[0] == b"cat"
    words = word_tokenizer(["ann", "shows", "7", ".", "\\boxed{", "}", "<think>", "</think>"])
    objective = rpt(words, strip=True)
    tokens = words("ann shows 7 .")["input_ids"]
    assert objective.truth(Position("d", 2, tuple(tokens[:2]), tuple(tokens[2:]))) == (b"7 .", [1, 3])


def said(text: str, span: bool = True) -> Thought:
    tokens = ids("so") + (CLOSE,) + ids(text)
    return Thought(
        tokens,
        (-1.0,) * len(tokens),
        FinishReason.CLOSE,
        0,
        0,
        (len(ids("so")) + 1, len(tokens)) if span else None,
    )


@pytest.mark.parametrize(
    ("text", "prefix", "first"),
    [
        ("\\boxed{ cat}", 1, 1),
        ("\\boxed{ cat sat}", 1, 1),
        ("\\boxed{cat}", 0, 0),
        ("\\boxed{ ca}", 0, 0),
        ("\\boxed{}", 0, 0),
        (" cat", 0, 0),
        ("\\boxed{ cat", 0, 0),
        ("\\boxed{ dog} \\boxed{ cat}", 1, 1),
        ("\\boxed{ cat} \\boxed{ dog}", 0, 0),
        ("\\boxed{ cat sat and so on and on and on}", 0, 1),  # longer than the window
    ],
)
def test_what_a_prediction_earns(text, prefix, first):
    tokens = ids("the cat sat")
    assert [raw([t]) for t in tokens][1:] == [b" cat", b" sat"]
    position = Position("d", 1, tokens[:1], tokens[1:])
    for match, wanted in (("prefix", prefix), ("first_token", first)):
        objective = rpt(match=match)
        truth, ends = objective.truth(position)
        assert objective.right(said(text), truth, ends) == bool(wanted)
    assert not objective.right(said(text, span=False), truth, ends)  # no prediction was sampled


def test_a_rollout_thinks_then_predicts():
    objective = rpt(max_prediction_tokens=17)
    open_thought = Thought(ids("so"), (-1.0,) * len(ids("so")), FinishReason.LENGTH, 6, 2)
    thoughts = [
        Thought((*ids("so"), CLOSE), (-1.0,) * (len(ids("so")) + 1), FinishReason.CLOSE, 6, k) for k in (0, 1)
    ]
    engine = Scripted([*thoughts, open_thought], ["\\boxed{ cat}", "\\boxed{ dog"])
    position = Position("d", 1, ids("the cat sat")[:1], ids("the cat sat")[1:])
    (group,) = asyncio.run(objective.rollout(engine, [position], [3]))
    (prompts, params, n, seeds) = engine.asked[1]
    assert (
        n == 1
        and params.max_thought_tokens == 17
        and len(set(seeds)) == 2
        and all(0 <= s < 2**62 for s in seeds)
    )
    assert [p.token_ids for p in prompts] == [(*ids("the"), OPEN, *t.token_ids) for t in thoughts]
    assert all(p.stop_strings == ("}",) for p in prompts)
    right, unfinished, unclosed = group.thoughts
    assert group.rewards == (1.0, 0.0, 0.0) and unclosed == open_thought and group.policy_version == 5
    assert right.token_ids == thoughts[0].token_ids + ids("\\boxed{ cat}") and len(
        right.behaviour_logps
    ) == len(right.token_ids)
    assert right.finish_reason is FinishReason.CLOSE and unfinished.finish_reason is FinishReason.LENGTH
    assert right.token_ids[slice(*right.answer_span)] == ids("\\boxed{ cat}") and right.policy_version == 5


def test_groups_that_teach_nothing_are_dropped():
    objective, kept = rpt(), rpt(dynamic_sampling=False)
    groups = [group_with(r) for r in ((1.0, 0.0), (0.0, 0.0), (1.0, 1.0))]
    assert objective.select(groups) == groups[:1] and kept.select(groups) == groups
    assert rpt(match="dense").select(groups) == groups


def group_with(rewards):
    return Group("g", Position("d", 1, (1,), (2,)), Prompt((1,), ()), (), 0, rewards=rewards)


@pytest.mark.parametrize("proxy", [True, False])
def test_positions_where_the_next_token_is_unsure(values, proxy):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(values["model"])
    fields = {"template": "raw", "target_length": 2, "positions_per_document": 99, "min_entropy": 1.5}
    objective = RPT(Config(**fields, **({"proxy": values["model"]} if proxy else {})), tokenizer)
    document = Document("d", tuple(tokenizer("ann has 6 bob up3 cat times3 shows 7 .")["input_ids"]))
    sure = torch.tensor([0.0, 9.0] * 5)
    if proxy:
        assert objective.needs == frozenset()
        values_ = objective.proxy(document)
        assert (
            values_.shape == (10,) and values_[0].isnan() and 2.0 < float(values_[1]) <= np.log(16)
        )  # a random model
        objective.proxy.model.lm_head.weight.data.zero_()
        assert objective.proxy(document)[1:].numpy() == pytest.approx(np.full(9, np.log(16)), abs=1e-5)
        objective.proxy = lambda d: sure
    else:
        assert objective.needs == {"entropy"}
    found = objective.positions(document, np.random.default_rng(0), None if proxy else sure)
    assert [p.index for p in found] == [1, 3, 5, 7]


@pytest.mark.parametrize("match", ["prefix", "first_token", "dense", "conditional_dense"])
def test_rewards_of_a_run(values, match):
    objective = {
        "name": "rpt",
        "template": "raw",
        "positions": "after",
        "marker": "shows",
        "target_length": 2,
        "match": match,
        "opening": "shows",
        "closing": ".",
        "strip": True,
        "max_prediction_tokens": 60,
        "dynamic_sampling": False,
    }
    changes = {
        "objective": objective,
        "positions_per_step": 6,
        "sampling__max_thought_tokens": 60,
        "max_steps": 2,
    }
    run = Run(build(merged(values, **changes)), None)
    batch = run.next_batch()
    micros = run.pack(batch, run.count(batch))
    assert sum(int(m.counted.sum()) for m in micros) == 24 and any(
        t.answer_span for g in batch.groups for t in g.thoughts
    )
    for micro in micros:
        assert bool(micro.target_mask.any()) == ("dense" in match)
        for b, group in enumerate(micro.groups):  # the prediction is trained like the thought before it
            for g, thought in enumerate(group.thoughts):
                if micro.counted[b, g]:
                    assert micro.thought_labels[b, g][micro.thought_mask[b, g]].tolist() == list(
                        thought.token_ids
                    )
    train(run)
    run.close()
    assert run.step == 2


def test_found_by_name(values):
    assert find("rpt") is RPT
    _, gradient = one_step(
        values, objective={"name": "rpt", "template": "raw", "opening": "has", "closing": "."}
    )
    assert gradient
