"""What a weight sync and the probe after it cost."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.rollout_setup import HIDDEN_128, LONGEST, make_model, train
from rlpretrain.corpora import dial


def sync(rounds: int = 15) -> dict[str, Any]:
    """An in-process sync, and vLLM's packing alone, over a copy of the same tensors, for two models."""
    torch.set_num_threads(1)
    return {"hidden 128": measure_sync(rounds, **HIDDEN_128), "hidden 512": measure_sync(rounds)}


def measure_sync(rounds: int, **changes: Any) -> dict[str, Any]:
    """Medians over the rounds for one model."""
    from rollout.vllm_local import VLLMEngine

    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder), **changes)
        engine = VLLMEngine(folder, max_model_len=LONGEST, max_num_seqs=32, kv_cache_gib=0.1)
    parameters = [(name, p.detach()) for name, p in model.named_parameters(remove_duplicate=False)]
    ratios, packing, seconds = [], [], []
    for version in range(1, rounds + 1):
        begin = time.perf_counter()
        copy = {name: p.clone() for name, p in parameters}
        copying = time.perf_counter() - begin
        begin = time.perf_counter()
        engine.sync(lambda copy=copy: copy.items(), version)
        seconds.append(time.perf_counter() - begin)
        ratios.append(seconds[-1] / copying)
        packing.append(pack_matrices(copy) / copying)
    engine.close()
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "over_copy": statistics.median(ratios),
        "packing_over_copy": statistics.median(packing),
        "sync_ms": 1e3 * statistics.median(seconds),
    }


def pack_matrices(state: dict[str, torch.Tensor]) -> float:
    """Seconds in which oneDNN packs the matrices. vLLM's CPU kernels need this; a GPU does not."""
    from vllm import _custom_ops as ops

    matrices = [t for name, t in state.items() if t.ndim == 2 and "embed" not in name]
    begin = time.perf_counter()
    handlers = [ops.create_onednn_mm(t.t(), 32) for t in matrices]
    seconds = time.perf_counter() - begin
    del handlers
    return seconds


def probe() -> dict[str, Any]:
    """The probe's share of a step: hidden 512, a hundred positions, 8 thoughts of up to 64 tokens."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = dial.write(folder / "data", base=10, train=600, held_out=10, seed=0)
        make_model(folder / "base")
        dial.tokenizer().save_pretrained(folder / "base")
        rows = train(
            folder,
            "run",
            paths["train"],
            sampling={"thoughts": 8, "max_thought_tokens": 64},
            engine={"name": "vllm_local", "kv_cache_gib": 0.5},
            positions_per_step=100,
            max_steps=4,
        )[1:]
    return {
        "share": statistics.median(row["perf/probe_s"] / row["step_time"] for row in rows),
        "probe_ms": 1e3 * statistics.median(row["perf/probe_s"] for row in rows),
        "step_s": statistics.median(row["step_time"] for row in rows),
    }
