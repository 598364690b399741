"""The parts of `benchmarks.gpu` that take time: training steps, sampling, and a whole run."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_shapes import (
    Cell,
    Needed,
    Report,
    Settings,
    make_model,
    measuring,
    needed_by,
    peak_gib,
    wait_for,
)
from benchmarks.step_inputs import CLOSE, FIRST_WORD, OPEN, Shape, make_batch
from tests.builders.tiny import word_tokenizer


class Steps:
    """Training steps of one model, with the library's packing, scoring, losses and optimizer."""

    def __init__(self, settings: Settings, recomputed: bool, compiled: bool):
        from rlpretrain.config.io import build
        from rlpretrain.models.compilation import compile_layers
        from rlpretrain.models.randomness import checkpoint_layers
        from rlpretrain.objectives import load_objective
        from rlpretrain.ranks import Ranks
        from rlpretrain.scoring import attention
        from rlpretrain.training.backends.torch import TorchPolicy

        self.kind, self.recomputed, self.device = (
            (recomputed, compiled),
            recomputed,
            torch.device(settings.device),
        )
        self.token_budget = settings.recomputed_budget if recomputed else settings.token_budget
        self.config = build(
            {"model": "none", "data": "none", "objective": "rlp", "policy": {"backend": "torch"}}
        )
        self.objective = load_objective(self.config, word_tokenizer(["<think>", "</think>", "word"]))
        model = make_model(settings)
        attention.install(model)
        if recomputed:
            checkpoint_layers(model)
        if compiled:
            compile_layers(model, settings.backend)
        ranks = Ranks(device=self.device)
        self.policy = TorchPolicy(model, self.config.policy, self.config.optim, total_steps=1000, ranks=ranks)

    def batch(self, shape: Shape, step: int, kind: str) -> Any:
        """A document with its groups; for `ntp` documents of about as many tokens as the tree."""
        from rlpretrain.types import Batch, Document

        ids, groups = make_batch(shape, step)
        if kind != "ntp":
            return Batch(tuple(groups), (Document(f"d{step}", ids),))
        tokens = shape.document + shape.positions * shape.thoughts * (shape.thought + shape.target)
        drawn = (
            make_batch(replace(shape, thoughts=0), 1000 * (step + 1) + i)[0]
            for i in range(tokens // shape.document)
        )
        return Batch((), tuple(Document(f"n{i}", ids) for i, ids in enumerate(drawn)))

    def take(self, batch: Any, tree: bool) -> list[Any]:
        """One optimizer step; returns its micro-batches. Advantages of groups that are split are random."""
        from rlpretrain.scoring.packing import Layout, count, pack
        from rlpretrain.training.advantages import Advantages, compute_advantages
        from rlpretrain.training.losses import LossInputs, add_up, make_losses

        layout = Layout(self.token_budget, tree=tree)
        micros = list(pack(batch, layout, count(batch)))
        ids = [group.id for micro in micros for group in micro.groups]
        terms = make_losses(self.objective.losses())
        counts = [sum(term.count(micro) for micro in micros) for term in terms]
        for micro in micros:
            micro = micro.to(self.device)
            scores, thoughts = self.policy.score(micro), None
            if micro.groups and len(set(ids)) < len(ids):
                given = torch.randn(micro.counted.shape, device=self.device)
                thoughts = Advantages(given, given)
            elif micro.groups:
                thoughts = compute_advantages(self.objective, micro, scores)
            inputs = LossInputs(scores, micro, thoughts, self.objective, self.config.loss)
            self.policy.backward(add_up(terms, counts, inputs).loss)
        self.policy.step()
        return micros


def measure_steps(settings: Settings, report: Report) -> None:
    """A training step on a tree, on padded rows, and of next-token training on about as many tokens.

    With long documents activations are recomputed, so that a step is one micro-batch. Padded rows of long
    documents are measured at one position, which stands for all. Layers are compiled, and for the first
    document also as they are.
    """
    begin = time.perf_counter()
    first = settings.shapes[0]
    cells = [(shape, kind, True) for shape in settings.shapes for kind in ("tree", "ntp")]
    cells[2:2] = [(first, "tree", False), (first, "ntp", False), (first, "padded", False)]
    cells += [(shape, "padded", False) for shape in settings.shapes[1:]]
    steps: Steps | None = None
    for shape, kind, compiled in cells:
        name = f"document {shape.document}, {shape.thoughts} thoughts of {shape.thought}: {kind}"
        cell = Cell(name + ", compiled" * compiled)
        if time.perf_counter() - begin > 0.85 * settings.seconds:
            cell.status = "no time left"
        else:
            with measuring(cell):
                recomputed = settings.is_long(shape)
                if steps is None or steps.kind != (recomputed, compiled):
                    steps = None  # frees its memory
                    steps = Steps(settings, recomputed, compiled)
                cell.values = _measure_step(settings, steps, shape, kind)
            if cell.status != "ok":
                steps = None  # it may hold parts of a step
        report(cell)


def _measure_step(settings: Settings, steps: Steps, shape: Shape, kind: str) -> dict[str, Any]:
    share = shape.positions if kind == "padded" and settings.is_long(shape) else 1
    measured = replace(shape, positions=shape.positions // share)
    seconds, micros = [], []
    peak_gib(settings, reset=True)
    for step in range((1 if share > 1 else settings.repeats) + 1):
        batch = steps.batch(measured, step, kind)
        wait_for(settings)
        begin = time.perf_counter()
        micros = steps.take(batch, tree=kind == "tree")
        wait_for(settings)
        seconds.append(time.perf_counter() - begin)
    took = share * statistics.median(seconds[1:])
    needed = needed_by(micros)
    useful = needed if kind == "ntp" else needed_by(_one_tree(steps.batch(shape, 0, kind)))
    if kind == "tree":
        needed = useful  # a document that is split over micro-batches is computed more than once
    values = {
        "seconds": took,
        "first_s": seconds[0],
        "micro_batches": share * len(micros),
        "tokens": share * needed.tokens if kind == "padded" else needed.tokens,
        "useful_tokens_per_s": useful.tokens / took,
        "operations": _scaled(needed, share).operations(settings.model),
        "memory_gib": peak_gib(settings),
        "positions_measured": 0 if kind == "ntp" else measured.positions,
        "recomputed": steps.recomputed,
    }
    values["mfu"] = values["operations"] / took / settings.peak if settings.peak else None
    return values


def _scaled(needed: Needed, share: int) -> Needed:
    return Needed(share * needed.tokens, share * needed.pairs, share * needed.rows)


def _one_tree(batch: Any) -> list[Any]:
    """The batch as one tree, in which each shared token is once."""
    from rlpretrain.scoring.packing import Layout, count, pack

    return list(pack(batch, Layout(10**9, tree=True), count(batch)))


def measure_sampling(settings: Settings, report: Report) -> None:
    """Tokens a second of the HF engine, and of vLLM if it is installed: thoughts after half a document."""
    from rollout import HFEngine

    model = make_model(settings)
    engine: Any = HFEngine(model)
    for document in sorted({shape.document for shape in settings.shapes}):
        _measure_engine(settings, report, "hf", engine, document, 4 if settings.tiny else 64)
    if not _has_vllm(settings):
        return
    from rollout.vllm_local import VLLMEngine

    del engine
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        model = None
        torch.cuda.empty_cache()
        longest = max(shape.document for shape in settings.shapes)
        engine = VLLMEngine(folder, dtype="bfloat16", max_model_len=longest, kv_cache_gib=8)
        for document in sorted({shape.document for shape in settings.shapes}):
            for length in (64, 256):
                _measure_engine(settings, report, "vllm_local", engine, document, length)
        engine.close()


def _has_vllm(settings: Settings) -> bool:
    """Whether vLLM is measured; on a CPU the library's tests run it."""
    return settings.device.startswith("cuda") and importlib.util.find_spec("vllm") is not None


def _measure_engine(
    settings: Settings, report: Report, name: str, engine: Any, document: int, length: int
) -> None:
    """Thoughts of `length` tokens after prompts of half a document; the first call warms up."""
    from rollout.types import Prompt, SamplingParams

    shape = next(shape for shape in settings.shapes if shape.document == document)
    positions = shape.positions if document < 8192 else 1
    cell = Cell(f"{name}: {positions * shape.thoughts} thoughts of {length} after {document // 2} tokens")
    with measuring(cell):
        ids, _ = make_batch(replace(shape, thoughts=0), 0)
        prompts = [
            Prompt((*ids[: document // 2 - 1 - p], OPEN), (CLOSE,), (CLOSE,)) for p in range(positions)
        ]
        peak_gib(settings, reset=True)

        def sample(tokens: int, seed: int) -> float:
            wait_for(settings)
            begin = time.perf_counter()
            seeds = [seed + i * shape.thoughts for i in range(len(prompts))]
            sampled = asyncio.run(engine.sample(prompts, SamplingParams(tokens), shape.thoughts, seeds))
            wait_for(settings)
            made = sum(len(thought.token_ids) for group in sampled for thought in group)
            return made / (time.perf_counter() - begin)

        sample(2, 0)
        cell.values = {"tokens_per_s": sample(length, 1000), "memory_gib": peak_gib(settings)}
    report(cell)


def measure_run(settings: Settings, report: Report) -> None:
    """RLP by the library's own entry from random weights: with vLLM if it is installed, then with hf."""
    shape = settings.shapes[0]
    if _has_vllm(settings):
        vllm = {"name": "vllm_local", "kv_cache_gib": 8.0}
        _measure_run(settings, report, vllm, shape.thought, 20)
    _measure_run(settings, report, {"name": "hf"}, min(32, shape.thought), 20)


def _measure_run(
    settings: Settings, report: Report, engine: dict[str, Any], thought: int, steps: int
) -> None:
    """Medians of all steps but the first five."""
    from rlpretrain import Pretrainer
    from rlpretrain.config.io import build

    cell = Cell(f"{steps} steps of RLP, engine {engine['name']}, thoughts of {thought}")
    shape = settings.shapes[0]
    with measuring(cell), tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_model(settings, folder, shape)
        compiled = settings.device.startswith("cuda")
        values = {
            "model": {
                "path": str(folder / "model"),
                "from_scratch": True,
                "dtype": "bfloat16",
                "compile": compiled,
            },
            "data": {"path": str(folder / "documents.jsonl"), "max_length": shape.document},
            "objective": {
                "name": "rlp",
                "positions_per_document": shape.positions,
                "target_length": shape.target,
            },
            "engine": engine,
            "positions_per_step": shape.positions,
            "sampling": {"thoughts": shape.thoughts, "max_thought_tokens": thought, "cut": "force_close"},
            "token_budget": settings.token_budget,
            "max_steps": steps,
            "baseline": {"frozen_every": 0},
            "policy": {"backend": "torch"},
            "checkpoint": {"every": 0},
            "stop": {"collapse": False},
            "device": settings.device,
            "console": False,
            "output_dir": str(folder / "run"),
        }
        peak_gib(settings, reset=True)
        begin = time.perf_counter()
        Pretrainer(build(values)).train()
        whole = time.perf_counter() - begin
        cell.values = _numbers_of(folder / "run", steps, settings.peak)
        cell.values |= {"whole_s": whole, "memory_gib": peak_gib(settings)}
    report(cell)


def _numbers_of(run: Path, steps: int, peak: float | None) -> dict[str, Any]:
    """Medians of a run's metrics, its check of the tree, and its MFU with all that a step does."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "step_time" in row]
    facts = json.loads((run / "run.json").read_text())
    if len(rows) != steps:
        raise ValueError(f"{len(rows)} of {steps} steps are logged")
    values: dict[str, Any] = {}
    for key in sorted({key for row in rows for key, value in row.items() if isinstance(value, int | float)}):
        known = [row[key] for row in rows[5:] if row.get(key) is not None]
        if known and key.startswith(("perf/", "step_time", "loss", "grad_norm", "ig/", "batch/", "num_")):
            values[key] = statistics.median(known)
    spent = rows[-1].get("num_flops", 0) - rows[4].get("num_flops", 0)
    took = sum(row["step_time"] for row in rows[5:])
    values["mfu_with_sampling"] = spent / took / peak if peak else None
    differences = [value for key, value in _flat(facts).items() if key.endswith("tree_difference")]
    values["tree_check_nats"] = differences[0]
    return values


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {key: value}
    return {name: inner for k, v in value.items() for name, inner in _flat(v, f"{key}.{k}").items()}


def _write_model(settings: Settings, folder: Path, shape: Shape) -> None:
    """Configuration, tokenizer of words and random documents."""
    from transformers import AutoConfig

    words = [f"w{i}" for i in range(settings.model["vocab_size"] - FIRST_WORD)]
    word_tokenizer(["<think>", "</think>", *words]).save_pretrained(folder / "model")
    fields = settings.model | {"max_position_embeddings": 40960, "pad_token_id": 0}
    AutoConfig.for_model("qwen3", **fields, bos_token_id=1, eos_token_id=1).save_pretrained(folder / "model")
    with (folder / "documents.jsonl").open("w") as lines:
        for document in range(24):
            ids, _ = make_batch(replace(shape, thoughts=0), document)
            text = " ".join(words[i - FIRST_WORD] for i in ids)
            lines.write(json.dumps({"text": text}) + "\n")
