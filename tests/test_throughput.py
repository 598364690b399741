"""Operations, tokens per second and the share of a device's peak, against other ways of counting them."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from rlpretrain import Pretrainer
from rlpretrain.config import LoraConfig
from rlpretrain.config.engines import HFConfig
from rlpretrain.config.io import build
from rlpretrain.models.adapters import add_lora
from rlpretrain.models.spending import Reads, size_of
from rlpretrain.scoring import attention
from rlpretrain.scoring.scorer import Scorer
from rlpretrain.tools import doctor
from rlpretrain.tools.dry_run import make_objective, model_shape, resolve_settings
from rlpretrain.tools.sizes import make_sizes
from rlpretrain.tracking.peaks import find_peak, peak_of
from rlpretrain.training.loop import train
from rlpretrain.training.run import Run
from rlpretrain.tree import grow
from tests.builders.runs import launch, merged
from tests.builders.tiny import tiny_model

VOCABULARY = 64
FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
ATTENTION = (torch.ops.aten.bmm, FLASH, FLASH_BACKWARD)


def pairs_of(query: Any, key: Any, causal: bool) -> float:
    """Pairs of tokens in a call of torch's kernel, over rows and heads."""
    rows, heads, queries, _ = query
    return rows * heads * (queries * (queries + 1) / 2 if causal else queries * key[2])


def forward_flops(q: Any, k: Any, v: Any, _p: float = 0.0, causal: bool = False, **_: Any) -> float:
    return 4 * q[3] * pairs_of(q, k, causal)


def backward_flops(
    grad: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, p: float, causal: bool, **_: Any
) -> float:
    return 8 * q[3] * pairs_of(q, k, causal)


def product_flops(_into: Any, a: Any, b: Any, **_: Any) -> float:
    return 2 * a[0] * a[1] * b[1]


def counted_by_torch(work: Any) -> tuple[float, float]:
    """Operations of the matrix products of layers and head, and of attention, as torch sees them run."""
    more = {FLASH: forward_flops, FLASH_BACKWARD: backward_flops, torch.ops.aten.addmm_: product_flops}
    with FlopCounterMode(display=False, custom_mapping=more) as counter:
        work()
    by_kind: Counter[Any] = Counter(counter.get_flop_counts()["Global"])
    of_attention = sum(by_kind[kind] for kind in ATTENTION)
    return by_kind.total() - of_attention, of_attention


def both_counts(scorer: Scorer, inputs: tuple[Any, ...], backward: bool, squares: float | None = None) -> Any:
    """(torch's operations, ours), each of layers with the head and of attention.

    With `squares`, the pairs of a kernel that computes all of them and masks half.
    """

    def work() -> None:
        with torch.set_grad_enabled(backward):
            logps, _ = scorer(*inputs)
        if backward:
            logps.sum().backward()

    theirs = counted_by_torch(work)
    reads, size = scorer.reads.take(), size_of(scorer.model)
    again = 2 * size.head * reads.trained_rows  # the logits that the head's backward computes a second time
    linear = Reads(reads.tokens, 0, reads.rows, reads.trained_tokens, 0, reads.trained_rows)
    pairs = Reads(0, reads.pairs, 0, 0, reads.trained_pairs, 0)
    if squares is not None:
        assert reads.pairs + reads.trained_pairs < squares
        pairs = Reads(0, 0.0 if backward else squares, 0, 0, squares if backward else 0.0, 0)
    return theirs, (size.operations(linear) + again, size.operations(pairs))


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("name", ["qwen3", "llama", "gpt2", "gpt_neox", "qwen3_moe"])
def test_operations_of_padded_rows_are_those_that_torch_counts(name, backward):
    model = tiny_model(name, VOCABULARY, attn_implementation="eager", experts_implementation="eager")
    ids = torch.arange(3 * 16).view(3, 16) % VOCABULARY
    rows = torch.tensor([0, 5, 5, 20, 47])
    inputs = (ids, torch.ones_like(ids), None, rows, rows % VOCABULARY)
    theirs, ours = both_counts(Scorer(model), inputs, backward, squares=3 * 16**2)
    assert ours == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize("backward", [False, True])
def test_operations_of_a_tree_are_those_that_torch_counts(backward):
    """Segments of equal length, since the kernel pads others in its batches."""
    model = tiny_model("qwen3", VOCABULARY, attn_implementation="sdpa")
    assert attention.install(model) is None
    trunk, thoughts = [*range(1, 21)], [[30 + 7 * k + i for i in range(6)] for k in range(4)]
    ids, tree, where = grow([trunk, *(trunk[:12] + thought for thought in thoughts)])
    rows = torch.from_numpy(where[1])
    inputs = (
        torch.from_numpy(ids)[None],
        torch.ones(1, len(ids), dtype=torch.long),
        torch.from_numpy(tree.positions)[None],
        rows,
        rows % VOCABULARY,
        1.0,
        "logps",
        tree,
    )
    assert len(ids) == 20 + 4 * 6
    theirs, ours = both_counts(Scorer(model), inputs, backward)
    assert ours == pytest.approx(theirs, rel=1e-6)


def test_operations_of_adapters_are_those_that_torch_counts():
    """Of the frozen weights only the activations' gradients, of the adapters both; the first layer's inputs
    need none.
    """
    model = tiny_model("llama", VOCABULARY, attn_implementation="eager", num_hidden_layers=12)
    add_lora(model, LoraConfig(r=4))
    ids = torch.arange(3 * 16).view(3, 16) % VOCABULARY
    rows = torch.tensor([0, 5, 5, 20, 47])
    inputs = (ids, torch.ones_like(ids), None, rows, rows)
    theirs, ours = both_counts(Scorer(model), inputs, True, squares=3 * 16**2)
    assert ours == pytest.approx(theirs, rel=0.01)


# a run


def run_of(values: dict[str, Any], **changes: Any) -> tuple[Run, list[dict[str, float]], Any]:
    """A run in padded rows, its logged rows, and for each step the forwards with gradient.

    A forward is the lengths of its rows and the number of rows that its head reads.
    """
    run = Run(build(merged(values, packing="padded", **changes)), None)
    trained: dict[int, list[Any]] = {}

    def watch(_: Any, inputs: tuple[Any, ...]) -> None:
        if torch.is_grad_enabled():
            trained.setdefault(run.step, []).append((inputs[1].sum(1).double(), len(inputs[3])))

    run.policy.scorer.register_forward_pre_hook(watch)
    train(run)
    run.close()
    log = (Path(run.config.output_dir) / "metrics.jsonl").read_text().splitlines()
    return run, [json.loads(line) for line in log], trained


def trained_operations(run: Run, forwards: list[Any]) -> float:
    """6 operations for each parameter and token, and 12 for each pair of tokens and width of attention."""
    size = size_of(run.policy.model)
    tokens = sum(float(lengths.sum()) for lengths, _ in forwards)
    pairs = sum(float((lengths * (lengths + 1) / 2).sum()) for lengths, _ in forwards)
    rows = sum(rows for _, rows in forwards)
    return 6 * size.matrices * tokens + 6 * size.head * rows + 12 * size.attention * pairs


def test_numbers_of_a_step_are_its_work_over_its_seconds(values):
    run, rows, forwards = run_of(values, peak_flops=1e12, loss__inner_epochs=2)
    before = 0.0
    for step, row in enumerate(rows):
        flops, seconds = row["num_flops"] - before, row["step_time"]
        before = row["num_flops"]
        tokens = sum(float(lengths.sum()) for lengths, _ in forwards[step])
        assert row["perf/tokens_per_s"] * seconds == pytest.approx(tokens)
        assert row["perf/flops_per_s"] * seconds == pytest.approx(flops)
        assert row["perf/step_mfu"] * seconds * 1e12 == pytest.approx(flops)
        in_training = row["perf/mfu"] * row["perf/train_s"] * 1e12
        trained = trained_operations(run, forwards[step])
        # of the two epochs' 2 x 6 operations: the first scoring pass adds 2
        assert in_training == pytest.approx(trained * (1 + 2 / 12), rel=1e-6)
    assert run.facts["peak_flops"] == 1e12


def test_without_a_peak_there_is_no_mfu(values):
    _, rows, _ = run_of(values)
    assert all({"perf/tokens_per_s", "perf/flops_per_s"} <= row.keys() for row in rows)
    assert not any("mfu" in name for row in rows for name in row)


def test_entropies_of_positions_are_sampling_and_not_training(values):
    entropies = {"name": "rlp", "positions": "entropy"}
    run, rows, forwards = run_of(values, peak_flops=1e12, max_steps=1, objective=entropies)
    in_training = rows[0]["perf/mfu"] * rows[0]["perf/train_s"] * 1e12
    assert in_training == pytest.approx(trained_operations(run, forwards[0]), rel=1e-6)
    assert run.work.on_ranks == run.work.operations > in_training


def test_an_engine_elsewhere_does_not_use_the_ranks_devices(values, monkeypatch):
    monkeypatch.setattr(HFConfig, "in_process", False)
    run, _, _ = run_of(values, max_steps=1)
    assert run.work.on_ranks == run.work.in_training < run.work.operations


def test_two_ranks_add_their_tokens_and_share_their_peaks(values, tmp_path):
    changes = {"peak_flops": 1e12, "max_steps": 1}
    _, (one,), _ = run_of(values, **changes)
    shared = merged(values, output_dir=str(tmp_path / "two"), packing="padded", **changes)
    launch([{"config": shared}], tmp_path)
    two = json.loads((tmp_path / "two" / "metrics.jsonl").read_text())
    for name, times, cards in (
        ("perf/tokens_per_s", "step_time", 1),
        ("perf/flops_per_s", "step_time", 1),
        ("perf/mfu", "perf/train_s", 2),
        ("perf/step_mfu", "step_time", 2),
    ):
        assert two[name] * two[times] * cards == pytest.approx(one[name] * one[times]), name


def test_the_console_shows_tokens_and_mfu(values, capsys):
    Pretrainer(build(merged(values, peak_flops=1e9, max_steps=1, console=True))).train()
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("step 1 "))
    assert re.search(r"  tokens/s [\d,.]+  mfu 0\.\d{3}  ", line)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA L40", None),
        ("Tesla V100-SXM2-16GB", None),
    ],
)
def test_peaks_by_name(name, peak):
    assert peak_of(name) == peak


def test_a_peak_given_by_hand_goes_first():
    assert find_peak("cpu") is None and find_peak("cpu", 3e12) == 3e12


@pytest.mark.parametrize(
    ("name", "shown", "advice"),
    [
        ("NVIDIA H100 80GB HBM3", "989 TFLOP/s in bf16", "auto: 9.89e+14"),
        ("NVIDIA GeForce RTX 3060", "RTX 3060", "not known: set it for perf/mfu"),
    ],
)
def test_doctor_and_dry_run_say_the_peak_of_a_gpu(name, shown, advice, values, monkeypatch):
    """Only the name of the GPU is made up here."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
    (check,) = doctor.device()
    assert shown in check.found
    config = build(merged(values, device="cuda"))
    objective = make_objective(config, [])
    sizes = make_sizes(config, objective, model_shape(config.model, Path())[0], [])
    assert resolve_settings(config, objective, sizes)["peak_flops"] == advice
