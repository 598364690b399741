"""Padded packing and scoring against each row's own full logits, over architectures and ragged groups."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlpretrain.scoring.checks import check_head
from rlpretrain.scoring.packing import Layout, count, idle, pack
from rlpretrain.scoring.scorer import Scorer, score
from rlpretrain.types import Batch
from rollout.types import FinishReason
from tests.builders.batches import CLOSE, VOCABULARY, logps_of, random_batch
from tests.builders.tiny import ARCHITECTURES, tiny_model


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_scores_equal_full_logits_row_by_row(architecture):
    model = tiny_model(architecture, vocab_size=VOCABULARY, seed=1)
    assert check_head(model) < 1e-4
    batch = random_batch(random.Random(0))
    layout = Layout(token_budget=150, cut="force_close")
    micros = list(pack(batch, layout, count(batch, "force_close")))
    assert len(micros) > 1
    seen = 0
    with torch.no_grad():
        for micro in micros:
            scores = score(Scorer(model), micro)
            for b, group in enumerate(micro.groups):
                target = group.position.target_ids
                no_think = logps_of(model, [*group.position.context_ids, *target])[-len(target) :]
                torch.testing.assert_close(
                    scores.baseline_logps[b, : len(target)], no_think, rtol=0, atol=1e-5
                )
                for g, thought in enumerate(group.thoughts):
                    close = () if thought.finish_reason is FinishReason.CLOSE else (CLOSE,)
                    row = logps_of(model, [*group.prompt.token_ids, *thought.token_ids, *close, *target])
                    start, size = len(group.prompt.token_ids) - 1, len(thought.token_ids)
                    torch.testing.assert_close(
                        scores.thought_logps[b, g, :size], row[start : start + size], rtol=0, atol=1e-5
                    )
                    torch.testing.assert_close(
                        scores.target_logps[b, g, : len(target)], row[-len(target) :], rtol=0, atol=1e-5
                    )
                    assert int(micro.thought_mask[b, g].sum()) == size
                    seen += 1
        trunk = torch.cat([score(Scorer(model), m).trunk_logps for m in micros]).sum()
        whole = torch.stack([logps_of(model, d.token_ids).sum() for d in batch.documents]).sum()
    assert seen == 18
    torch.testing.assert_close(trunk, whole, rtol=1e-5, atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 3), st.integers(1, 5), st.integers(1, 400))
def test_packing_splits_only_what_fits_nowhere_and_counts_everything_once(
    seed, documents, positions, thoughts, budget
):
    batch = random_batch(random.Random(seed), documents, positions, thoughts, target=3)
    totals = count(batch, "mask")
    micros = list(pack(batch, Layout(budget, cut="mask"), totals))
    packed = [
        (g.id, k + i)
        for m in micros
        for g, k in zip(m.groups, m.offsets, strict=True)
        for i in range(len(g.thoughts))
    ]
    assert sorted(packed) == sorted((g.id, i) for g in batch.groups for i in range(thoughts))
    assert sum(int(m.counted.sum()) for m in micros) == totals.thoughts
    assert sum(int(m.thought_mask.sum()) for m in micros) == totals.thought_tokens
    assert sum(len(m.trunk_rows) for m in micros) == totals.trunk
    for m in micros:
        assert m.input_ids.numel() <= budget or [len(g.thoughts) for g in m.groups] in ([], [1])
        assert all(len(g.thoughts) == thoughts for g in m.groups) or len(m.groups) == 1
        labels = m.input_ids.flatten()[m.thought_rows[m.thought_mask] + 1]
        assert torch.equal(
            labels, m.thought_labels[m.thought_mask]
        )  # a state predicts the token right after it
        seen = m.target_mask[:, None, :] & m.counted[:, :, None]
        wanted = m.target_labels[:, None, :].expand_as(m.target_rows)
        assert torch.equal(m.input_ids.flatten()[m.target_rows[seen] + 1], wanted[seen])
        assert torch.equal(
            m.input_ids.flatten()[m.baseline_rows[m.target_mask] + 1], m.target_labels[m.target_mask]
        )


def test_the_thought_never_changes_what_comes_before_it_nor_other_rows():
    model = tiny_model("llama", vocab_size=VOCABULARY, seed=2)
    batch = random_batch(random.Random(3), documents=2, positions=1)
    layout, totals = Layout(10_000, cut="force_close"), count(batch, "force_close")
    one = next(pack(batch, layout, totals))
    with torch.no_grad():
        whole = score(Scorer(model), one)
        alone = [
            score(Scorer(model), next(pack(Batch((g,), batch.documents), layout, totals)))
            for g in batch.groups
        ]
    for scores, group in zip(alone, batch.groups, strict=True):
        b = [g.id for g in one.groups].index(group.id)
        size = len(group.position.target_ids)
        torch.testing.assert_close(
            whole.target_logps[b, :, :size], scores.target_logps[0, :, :size], rtol=0, atol=1e-5
        )


def test_a_model_that_does_unknown_things_to_its_logits_is_refused():
    model = tiny_model("qwen3", vocab_size=VOCABULARY)
    plain = model.forward

    def bent(*args, **kwargs):
        out = plain(*args, **kwargs)
        out.logits = out.logits * 1.7
        return out

    model.forward = bent
    with pytest.raises(ValueError, match="head_of does not support"):
        check_head(model)


def test_an_idle_micro_batch_adds_nothing_but_can_run():
    model = tiny_model("qwen3", vocab_size=VOCABULARY)
    scores = score(Scorer(model), idle(0))
    loss = scores.trunk_logps.sum() + scores.thought_logps.sum()
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert all(p.grad is None or torch.count_nonzero(p.grad) == 0 for p in model.parameters())


@pytest.mark.parametrize("tree", [False, True])
def test_documents_that_are_mixed_up_are_refused(tree):
    batch = random_batch(random.Random(0), 1, 1, 2, 1)
    (document,), (group,) = batch.documents, batch.groups
    with pytest.raises(ValueError, match="two documents of a batch have the id"):
        Batch((), (document, replace(document, token_ids=(*document.token_ids, 3))))
    at = group.position.index
    other = replace(document, token_ids=(*document.token_ids[:at], CLOSE, *document.token_ids[at + 1 :]))
    for wrong in (other, replace(document, token_ids=document.token_ids[:at])):
        mixed = Batch((group,), (wrong,))
        with pytest.raises(ValueError, match=f"target differs from the document at token {at}"):
            list(pack(mixed, Layout(1000, tree=tree), count(mixed)))
