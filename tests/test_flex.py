"""FlexAttention's tree mask on a CPU: its blocks, its numbers and gradients, and how often it is compiled.

GPU kernels are compiled from the same definition of the operator.
"""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import flex_attention as library

from rlpretrain.scoring.attention.blocks import BLOCK, blocks_of, count_pairs, walk
from rlpretrain.scoring.attention.cpu import TreeAttention
from rlpretrain.scoring.attention.flex import flex, mask_of, padded_size
from rlpretrain.tree import Tree, grow
from tests.builders.batches import random_batch
from tests.builders.flex import Compilations, flex_on_cpu, models_use_flex
from tests.builders.trees import laid, model_of, numbers, templated

CPU = torch.device("cpu")


def random_tree(rng: random.Random, document: int, branches: int) -> Tree:
    """A document, rows that branch off it, and rows that branch off any of these."""
    ids = [rng.randrange(4) for _ in range(document)]
    rows = [ids]
    for _ in range(branches):
        row = rng.choice(rows)
        rows.append(
            row[: rng.randint(0, len(row))] + [rng.randrange(4) for _ in range(rng.randint(1, document))]
        )
    return grow(rows).tree


def dense_mask(tree: Tree, padded: int, window: int | None) -> torch.Tensor:
    """Every pair, from the tree's own definition."""
    mask = np.eye(padded, dtype=bool)
    mask[: tree.size, : tree.size] = tree.dense()
    if window:
        mask[: tree.size, : tree.size] &= tree.positions[:, None] - tree.positions[None] < window
    return torch.from_numpy(mask)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), document=st.integers(1, 300), branches=st.integers(0, 8))
def test_blocks_are_those_that_torch_computes_from_every_pair(seed, document, branches):
    tree = random_tree(random.Random(seed), document, branches)
    enter, leave = walk(tree)
    assert np.array_equal((enter[None] <= enter[:, None]) & (enter[:, None] < leave[None]), tree.dense())
    padded = padded_size(tree.size)
    for window in (None, 7, 150):
        mask = dense_mask(tree, padded, window)
        theirs = library.create_block_mask(
            lambda b, h, i, j, mask=mask: mask[i, j], None, None, padded, padded, device="cpu"
        )
        in_blocks = mask.view(padded // BLOCK, BLOCK, padded // BLOCK, BLOCK)
        assert np.array_equal(count_pairs(tree, padded, window), in_blocks.sum((1, 3)).numpy())
        ours = mask_of(tree, padded, window, CPU)
        for name in ours._fields[:8]:
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), (window, name)


@pytest.mark.parametrize("window", [None, 4096])
def test_blocks_of_64k_tokens_take_no_matrix_of_all_pairs(window):
    """Four documents of 4,096 tokens, each with 4 positions and 11 thoughts of 272 tokens."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(4):
        document = rng.integers(1000, size=4096)
        rows.append(document)
        for at in (500, 1500, 2500, 3500):
            rows += [np.concatenate([document[:at], rng.integers(1000, size=272)]) for _ in range(11)]
    tree = grow(rows).tree
    padded = padded_size(tree.size)
    assert padded > 64_000 and len(tree.lengths) == 180
    assert len(tree.forks) == 16 and tree.deepest == 4096
    tracemalloc.start()
    partial, full = blocks_of(tree, padded, window)
    enter, leave = walk(tree)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40 * 2**20, f"{peak / 2**20:.0f} MiB, where all pairs take {padded**2 / 2**20:.0f}"
    segment, place, limit = tree.reach
    for row, column in rng.integers(padded // BLOCK, size=(300, 2)):
        i, j = (np.arange(x * BLOCK, min((x + 1) * BLOCK, tree.size)) for x in (row, column))
        seen = place[j][None] < limit[segment[i]][:, segment[j]]
        seen &= tree.positions[j][None] <= tree.positions[i][:, None]
        if window:
            seen &= tree.positions[i][:, None] - tree.positions[j][None] < window
        if len(i) == len(j) == BLOCK:
            assert full[row, column] == seen.all()
            assert partial[row, column] == (seen.any() and not seen.all())
    assert full.any() and partial.any()


@pytest.fixture
def compilations() -> Iterator[Compilations]:
    """FlexAttention with gradients on a CPU; what it compiles is counted."""
    with flex_on_cpu() as backend:
        yield backend


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, as many keys as queries": ("llama", {"num_key_value_heads": 4}),
    "qwen3, grouped heads": ("qwen3", {}),
    "gemma2, every other layer with a window, soft caps": ("gemma2", {}),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_scores_and_trains_as_on_padded_rows_and_on_the_cpu_path(name, compilations):
    architecture, changes = MODELS[name]
    model = model_of(architecture, **{"attn_implementation": "eager"} | changes)
    batches = [
        random_batch(random.Random(1), documents=3, positions=4, thoughts=5, target=12),
        random_batch(random.Random(2), documents=1, positions=1, thoughts=1, target=2),
        templated(random.Random(3), groups=4, thoughts=4),
    ]
    seen: list[Tree] = []
    for batch in batches:
        trees, rows = laid(batch, tree=True), laid(batch, tree=False)
        references = [numbers(model, rows), numbers(model, trees)]
        with models_use_flex() as calls:
            logps, gradients = numbers(model, trees)
        seen += calls
        for reference_logps, reference_gradients in references:
            for key, value in reference_logps.items():
                torch.testing.assert_close(logps[key], value, rtol=2e-6, atol=1e-5)
            largest = max(float(g.abs().max()) for g in reference_gradients.values())
            assert gradients.keys() == reference_gradients.keys()
            for key, value in reference_gradients.items():
                scale = max(float(value.abs().max()), 1e-3 * largest)
                assert float((gradients[key] - value).abs().max()) <= 1e-4 * scale, key
    assert {tree.size for tree in seen} == {m.tree.size for batch in batches for m in laid(batch, True)}
    assert max(tree.size for tree in seen) > 2 * BLOCK
    assert len(compilations.graphs) == (2 if architecture == "gemma2" else 1), "one for each kind of layer"


def attend(tree: Tree, window: int | None = None) -> None:
    """One call with gradient and one without, compared with the CPU path."""
    where = tree, 0.25, window, None
    made = [torch.randn(1, tree.size, heads, 16, requires_grad=True) for heads in (4, 2, 2)]
    q, k, v = (x.transpose(1, 2) for x in made)  # the layout of models
    grad = torch.randn(1, 4, tree.size, 16)
    ours = flex(q, k, v, *where)
    theirs = TreeAttention.apply(q, k, v, *where)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    pairs = zip(torch.autograd.grad(ours, made, grad), torch.autograd.grad(theirs, made, grad), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(flex(q, k, v, *where), theirs, rtol=1e-5, atol=1e-5)


def test_trees_of_all_sizes_take_one_compilation(compilations):
    """With gradient, and one without: sizes below, at and above whole blocks, other numbers of branches."""
    rng = random.Random(0)
    trees = [grow([list(range(n))]).tree for n in (1, 127, 128, 129, 256, 300, 384, 512)]
    trees += [random_tree(rng, rng.randint(2, 150), rng.randint(0, 9)) for _ in range(16)]
    assert len({padded_size(tree.size) for tree in trees}) >= 5
    for tree in trees:
        attend(tree)
    assert len(compilations.graphs) == 2
    for graph in compilations.graphs:
        lengths = [node.meta["example_value"].shape[2] for node in graph.graph.nodes if node.name == "l_q_"]
        assert len(lengths) == 1 and isinstance(lengths[0], torch.SymInt)


def test_many_forms_of_heads_are_compiled_in_every_thread(compilations):
    """Layers recomputed in a backward pass on a GPU run in another thread, whose settings are torch's."""
    tree = grow([list(range(20))]).tree

    def run() -> None:
        for width in range(16, 26):
            q = torch.randn(1, 2, tree.size, width)
            theirs = TreeAttention.apply(q, q, q, tree, 0.25, None, None)
            torch.testing.assert_close(flex(q, q, q, tree, 0.25, None, None), theirs, rtol=1e-5, atol=1e-5)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(run).result()
    assert len(compilations.graphs) == 10


def test_another_window_size_is_only_another_input(compilations):
    rng = random.Random(1)
    for window in (7, 9, 20, 150):
        attend(random_tree(rng, 150, 4), window)
    assert len(compilations.graphs) == 2
