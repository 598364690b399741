"""`rlpretrain init`: a configuration to begin with, from a model, documents and a machine.

What is chosen here is our choice, except where the README or the RLP paper (arXiv 2510.01265) is named. It is
meant to run and to be changed: every line of the file says why it is there.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlpretrain.config import ConfigError, DataConfig, ModelConfig, PretrainConfig
from rlpretrain.config.io import build
from rlpretrain.data.opening import column_names, open_rows, quiet
from rlpretrain.experiments.experiment import overlay
from rlpretrain.models.lengths import limit_of
from rlpretrain.models.loading import load_tokenizer
from rlpretrain.objectives import config_of, parse_section
from rlpretrain.tools.commented import FirstConfig
from rlpretrain.tools.dry_run import make_objective, model_shape
from rlpretrain.tools.memory import GIB, memory, peak
from rlpretrain.tools.readiness import memory_here
from rlpretrain.tools.sizes import make_sizes

SAMPLED_ROWS = 500
"""Rows whose length is measured."""
USABLE = 0.9
"""Share of a device's memory that the estimate may take."""
PAIRS = (("question", "answer"), ("prompt", "completion"), ("prompt", "response"), ("problem", "solution"))
"""Columns that are taken for a prompt and its answer where there is no column `text`."""
RECOMPUTED = {"model": {"gradient_checkpointing": True}}
ADAPTERS = RECOMPUTED | {"policy": {"lora": {"r": 32, "alpha": 64}}, "optim": {"lr": 1e-4}}
IN_FOUR_BITS = ADAPTERS | {"model": {"gradient_checkpointing": True, "quantization": "4bit"}}
SAVINGS: tuple[tuple[str, dict[str, Any], int], ...] = (
    ("", {}, 1),
    ("recomputes activations: a forward more, less memory", RECOMPUTED, 1),
    ("recomputes activations, of smaller micro-batches", RECOMPUTED, 4),
    ("adapters instead of all weights, which do not fit", ADAPTERS, 4),
    ("adapters on a base in four bits: nothing larger fits", IN_FOUR_BITS, 4),
)
"""What saves memory, tried in turn: its comment, the fields, and by what token_budget is divided."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the user says; None is chosen here."""

    model: str
    data: str
    objective: str = "rlp"
    column: str | None = None
    answer_column: str | None = None
    held_out: str | None = None
    output_dir: str = "runs/first"
    device: str | None = None
    """cpu or cuda; by default what this machine has."""
    gib: float | None = None
    """Memory of a device in GiB; needed for a GPU that is not here."""
    processes: int = 1
    """GPUs, or processes on a CPU."""
    steps: int | None = None


def make_first_config(request: Request) -> FirstConfig:
    """A checked configuration for `request`.

    Raises ConfigError for documents that cannot be read, columns that cannot be guessed, an unknown
    objective, a model that is neither here nor on the hub, and a model that fits in no way.
    """
    device = request.device or ("cuda" if torch.cuda.is_available() else "cpu")
    first = FirstConfig({})
    gpu = device != "cpu"
    _describe_model(first, request, gpu)
    _describe_data(first, request, most=2048 if gpu else 512)
    _describe_method(first, request, gpu)
    _describe_run(first, request, device)
    _fit(first, request, device)
    return first


def _describe_model(first: FirstConfig, request: Request, gpu: bool) -> None:
    first.set("model.path", request.model)
    first.set(
        "model.dtype",
        "bfloat16" if gpu else "float32",
        "with a float32 copy for the optimizer" if gpu else "processors are slow in half precision",
    )
    if gpu and request.processes == 1:
        first.set("model.compile", True, "each layer by torch.compile; the first step takes longer")


def _describe_data(first: FirstConfig, request: Request, most: int) -> None:
    """Columns, the longest document, and the held-out file."""
    names = column_names(DataConfig(path=request.data))
    column, answer = choose_columns(names, request)
    first.set("data.path", request.data)
    first.set("data.column", column)
    if answer:
        first.set("data.answer_column", answer, "the thought comes between prompt and answer")
    data = DataConfig(path=request.data, column=column, answer_column=answer)
    length, why = _choose_length(data, ModelConfig(path=request.model), most)
    first.set("data.max_length", length, why)
    if request.held_out:
        DataConfig(path=request.held_out)
        first.set("eval.data", request.held_out, "documents that are not trained on")
        first.set("eval.every", 100)
    else:
        first.notes.append(
            "no held-out documents: with `eval: {data: FILE}` the run measures gain, controls and retention"
        )


def choose_columns(names: list[str], request: Request) -> tuple[str, str | None]:
    """(column, answer column) of the request, else the usual ones; ConfigError if they cannot be guessed."""
    for setting, name in (("--column", request.column), ("--answer-column", request.answer_column)):
        if name is not None and name not in names:
            raise ConfigError(
                f"{setting} {name}: {request.data} has no such column; it has {', '.join(names)}"
            )
    if request.column:
        return request.column, request.answer_column
    if request.answer_column is None and "text" in names:
        return "text", None
    for prompt, answer in PAIRS:
        if prompt in names and request.answer_column in (None, answer) and answer in names:
            return prompt, answer
    if len(names) == 1:
        return names[0], None
    raise ConfigError(f"which column of {request.data} has the text? --column NAME, of {', '.join(names)}")


def _choose_length(data: DataConfig, model: ModelConfig, most: int) -> tuple[int, str]:
    """(data.max_length, why): it holds 95% of the sampled documents, if `most` tokens are enough."""
    try:
        tokenizer = load_tokenizer(model)
    except Exception:  # a hub id on a machine without a network
        return most, "the tokenizer is not here, so documents were not measured"
    with quiet():
        rows: Any = open_rows(data)
        part = rows.select(range(min(len(rows), SAMPLED_ROWS)))
    columns = [data.column, *([data.answer_column] if data.answer_column else [])]
    texts = ["\n".join(str(row[column] or "") for column in columns) for row in part]
    lengths = sorted(len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"])
    wanted = lengths[int(0.95 * (len(lengths) - 1))] + 2
    length = 64
    while length < wanted and length < most:
        length *= 2
    share = sum(size + 2 <= length for size in lengths) / len(lengths)
    return length, f"{share:.0%} of {len(lengths)} sampled documents fit; longer ones are split"


def _describe_method(first: FirstConfig, request: Request, gpu: bool) -> None:
    """The objective and how thoughts are drawn."""
    owner, _ = parse_section({"name": request.objective})
    first.set("objective.name", request.objective)
    if not owner.has_positions:
        return
    if "answer_column" in first.values["data"]:
        first.set("objective.positions", "answer", "think before the answer")
    elif request.objective == "rlp":
        first.set(
            "objective.positions", "random", "where to think; `entropy` thinks where the model is unsure"
        )
        first.set("objective.target_length", 8, "tokens whose log-probability a thought is rewarded for")
    first.set("sampling.thoughts", 16 if gpu else 4, "per position")
    first.set("sampling.max_thought_tokens", 256 if gpu else 32)
    if gpu and request.processes == 1 and importlib.util.find_spec("vllm"):
        first.set("engine.name", "vllm_local", "samples with vLLM in this process")
    elif gpu:
        first.notes.append(
            "thoughts come from transformers, which samples slowly: install vLLM (engine: vllm_local on one "
            "GPU, vllm_server or ray on several)"
        )


def _describe_run(first: FirstConfig, request: Request, device: str) -> None:
    gpu = device != "cpu"
    per_step = 128 if gpu else 8
    per_step += -per_step % request.processes
    first.set("positions_per_step", per_step)
    first.set("max_steps", request.steps or (1000 if gpu else 100))
    first.set(
        "optim.lr",
        1e-6 if gpu else 2e-5,
        "the RLP paper's, for 1.7B parameters; small models take larger ones",
    )
    if gpu:
        first.set("token_budget", 16384, "tokens of a micro-batch: lower it where memory is short")
    else:
        first.set("token_budget", 2048, "tokens of a micro-batch")
    if request.device:
        first.set("device", device)
    if request.processes > 1 and gpu:
        first.set("policy.backend", "deepspeed")
        first.set("policy.zero_stage", 2)
    first.set("output_dir", request.output_dir)


def _fit(first: FirstConfig, request: Request, device: str) -> None:
    """Add the first change of SAVINGS with which the run fits, and note what it is estimated to take."""
    available = request.gib * GIB if request.gib else memory_here(device)
    build(first.values, config_of)
    try:
        shape, _ = model_shape(ModelConfig(path=request.model), Path())
    except ConfigError as error:
        if Path(request.model).expanduser().exists() or request.model.startswith((".", "/", "~")):
            raise
        first.notes.append(f"the memory was not estimated: {error}")
        return
    _shorten(first, shape)
    if available is None:
        first.notes.append("the memory of a GPU that is not here is not known: --gib says it")
        return
    needed = 0.0
    share = request.processes if device == "cpu" else 1  # processes on a CPU share its memory
    for reason, changes, parts in SAVINGS:
        tried = overlay(first.values, changes | {"token_budget": first.values["token_budget"] // parts})
        needed = share * _estimate(build(tried, config_of), request, shape)
        if needed <= USABLE * available:
            first.values = tried
            if reason:
                first.comments["model.gradient_checkpointing"] = reason
            if "optim" in changes:
                first.comments["optim.lr"] = "adapters take larger rates than whole models"
            first.notes.append(
                f"estimated memory: at most {needed / GIB:.1f} GiB of {available / GIB:.1f} GiB"
                + (" for all processes" if share > 1 else "")
            )
            return
    raise ConfigError(
        f"{request.model} needs {needed / GIB:.1f} GiB even with adapters on a base in four bits, and "
        f"{device} has {available / GIB:.1f} GiB: take a smaller model, or more memory (--gib, --processes)"
    )


def _shorten(first: FirstConfig, shape: Any) -> None:
    """Let documents and thoughts fit into the positions of the model."""
    limit, sampling = limit_of(shape), first.values.get("sampling")
    if limit is None:
        return
    room = limit.tokens
    if sampling:
        sampling["max_thought_tokens"] = min(sampling["max_thought_tokens"], room // 4)
        room -= sampling["max_thought_tokens"] + 64  # tags, template and target
    if first.values["data"]["max_length"] > room:
        first.set("data.max_length", max(room, 1), f"{limit.reason}; longer documents are split")


def _estimate(config: PretrainConfig, request: Request, shape: Any) -> float:
    """Bytes at the peak of one process."""
    notes: list[str] = []
    objective = make_objective(config, notes)
    with _world(request.processes):
        return peak(memory(config, shape, make_sizes(config, objective, shape, notes)))


@contextmanager
def _world(processes: int) -> Iterator[None]:
    """As if `processes` processes had been started, which is what a dry run asks the environment for."""
    before = os.environ.get("WORLD_SIZE")
    os.environ["WORLD_SIZE"] = str(processes)
    try:
        yield
    finally:
        if before is None:
            del os.environ["WORLD_SIZE"]
        else:
            os.environ["WORLD_SIZE"] = before
