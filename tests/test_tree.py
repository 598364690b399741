"""Tree packing and tree attention against the padded path: the same log-probs and the same gradients, over
architectures.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlpretrain.scoring import attention
from rlpretrain.tree import grow
from rlpretrain.types import Batch, Document
from rollout.types import FinishReason, Group, Position, Prompt, Thought
from tests.builders.batches import CLOSE, OPEN, VOCABULARY, random_batch
from tests.builders.tiny import tiny_model
from tests.builders.trees import MODELS, laid, model_of, numbers, templated


def check(model: Any, batch: Batch, budget: int = 10**6) -> None:
    """The tree's numbers are the padded ones."""
    micros = laid(batch, tree=True, budget=budget)
    theirs, their_grads = numbers(model, laid(batch, tree=False))
    ours, our_grads = numbers(model, micros)
    assert ours.keys() == theirs.keys() and our_grads.keys() == their_grads.keys()
    for name in theirs:
        torch.testing.assert_close(
            ours[name], theirs[name], rtol=2e-6, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
        )
    largest = max(float(g.abs().max()) for g in their_grads.values())
    for name, grad in their_grads.items():
        worst = float((our_grads[name] - grad).abs().max()) / max(float(grad.abs().max()), 1e-3 * largest)
        assert worst <= 1e-4, f"{name}: {worst:.1e}"


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    documents=st.integers(1, 3),
    positions=st.integers(1, 8),
    thoughts=st.integers(1, 16),
    target=st.integers(1, 32),
)
def test_a_tree_scores_and_trains_like_padded_rows(name, seed, documents, positions, thoughts, target):
    check(model_of(name), random_batch(random.Random(seed), documents, positions, thoughts, target))


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), groups=st.integers(1, 5), thoughts=st.integers(1, 6))
def test_prompts_that_share_a_part_of_their_heads(seed, groups, thoughts):
    check(model_of("qwen3"), templated(random.Random(seed), groups, thoughts))


@pytest.mark.parametrize("budget", [1, 60, 200])
def test_a_split_over_micro_batches_changes_nothing(budget):
    batch = random_batch(random.Random(4), 3, 4, 3, 2)
    assert len(laid(batch, True, budget)) > 1
    check(model_of("llama"), batch, budget)


def test_long_targets_and_documents():
    rng = random.Random(5)
    ids = tuple(rng.randrange(3, 60) for _ in range(300))
    thoughts = tuple(
        Thought(
            (*(rng.randrange(3, 60) for _ in range(n)), CLOSE), (-1.0,) * (n + 1), FinishReason.CLOSE, 0, n
        )
        for n in (0, 0, 90)
    )
    groups = tuple(
        Group(
            f"g{i}",
            Position("d", i, ids[:i], ids[i : i + 32]),
            Prompt((*ids[:i], OPEN), (CLOSE,), (CLOSE,)),
            thoughts,
            0,
        )
        for i in (1, 200, 260)
    )
    for name in ("llama", "mistral"):
        check(model_of(name, max_position_embeddings=512), Batch(groups, (Document("d", ids),)))


def test_gradient_checkpointing_and_bf16_autocast():
    batch = random_batch(random.Random(2), 2, 2, 3, 2)
    model = model_of("qwen3")
    plain, grads = numbers(model, laid(batch, True))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    again, same = numbers(model, laid(batch, True))
    for name in grads:
        torch.testing.assert_close(same[name], grads[name], rtol=1e-5, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        half, _ = numbers(model, laid(batch, True))
        padded, _ = numbers(model, laid(batch, False))
    assert max(float((half[n] - padded[n]).abs().max()) for n in plain if plain[n].numel()) < 0.1
    assert (
        max(float((half[n] - plain[n]).abs().max()) for n in plain if plain[n].numel()) > 1e-4
    )  # it did run in bf16


# the tree itself


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 10**6), least=st.integers(1, 8))
def test_every_row_is_a_path_and_sees_itself_only(seed, least):
    rng = random.Random(seed)
    base = [rng.randrange(4) for _ in range(40)]
    rows = [
        base[: rng.randint(1, 40)] + [rng.randrange(4) for _ in range(rng.randint(0, 12))]
        for _ in range(rng.randint(1, 8))
    ]
    ids, tree, where = grow(rows, least)
    assert len(ids) == tree.size <= sum(map(len, rows))
    dense = tree.dense()
    for row, at in zip(rows, where, strict=True):
        assert ids[at].tolist() == row and tree.positions[at].tolist() == list(range(len(row)))
        for k, token in enumerate(at):
            assert np.flatnonzero(dense[token]).tolist() == sorted(at[: k + 1].tolist())
    if least == 1:  # nothing that rows share is there twice
        assert tree.size == len({tuple(row[: k + 1]) for row in rows for k in range(len(row))})
    assert sorted(t for at in tree.bins for t in at[at >= 0].tolist()) == list(range(tree.size))


def test_what_is_shared_is_there_once():
    rng = random.Random(0)
    ids = tuple(rng.randrange(3, 60) for _ in range(100))
    words = [tuple(rng.randrange(3, 60) for _ in range(n)) for n in range(8)]
    said = tuple(
        Thought((*w, CLOSE), (-1.0,) * (len(w) + 1), FinishReason.CLOSE, 0, g) for g, w in enumerate(words)
    )
    groups = [
        Group(
            f"g{i}",
            Position("d", i, ids[:i], ids[i : i + 3]),
            Prompt((*ids[:i], OPEN), (CLOSE,), (CLOSE,)),
            said,
            0,
        )
        for i in (20, 60, 90)
    ]
    (micro,) = laid(Batch(tuple(groups), (Document("d", ids),)), tree=True)
    branches = sum(
        1 + len(t.token_ids) + 2 for t in said
    )  # open tag, thought, and the target but its last token
    assert micro.input_ids.numel() == len(ids) - 1 + 3 * branches
    assert micro.row_tokens == len(ids) + 8 * (20 + 60 + 90) + 3 * sum(1 + len(t.token_ids) + 3 for t in said)


# models that cannot


def test_models_that_cannot_are_named():
    from transformers import AutoConfig, AutoModelForCausalLM

    mamba = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("mamba", vocab_size=64, hidden_size=16, num_hidden_layers=1)
    )
    assert "MambaForCausalLM does not take its attention" in str(attention.why_not(mamba))
    oss = AutoConfig.for_model(
        "gpt_oss",
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        head_dim=16,
        num_key_value_heads=1,
        intermediate_size=32,
        num_local_experts=2,
    )
    assert "sinks" in str(attention.why_not(AutoModelForCausalLM.from_config(oss)))


def test_a_model_with_trees_does_everything_else_as_before():
    before, after = tiny_model("qwen3", VOCABULARY, seed=1), tiny_model("qwen3", VOCABULARY, seed=1)
    attention.install(after)
    attention.install(after)
    ids = torch.tensor([[3, 4, 5, 6, 0, 0], [7, 8, 9, 10, 11, 12]])
    mask = (ids > 0).long()
    assert torch.equal(before(ids, attention_mask=mask).logits, after(ids, attention_mask=mask).logits)
    said = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    assert torch.equal(before.generate(ids, **said), after.generate(ids, **said))
