"""`rlpretrain init`: a configuration to begin with, from a model, documents and a machine.

What is chosen here is our choice, except where the RLP paper (arXiv 2510.01265) is named. The file is meant
to run and to be changed: a field that is a choice says why.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from rlpretrain.config import ConfigError, ModelConfig, PretrainConfig
from rlpretrain.config.io import build
from rlpretrain.experiments.experiment import overlay
from rlpretrain.models import compilation
from rlpretrain.models.lengths import limit_of
from rlpretrain.objectives import config_of, parse_section
from rlpretrain.tools.commented import FirstConfig
from rlpretrain.tools.dry_run import make_objective, model_shape
from rlpretrain.tools.first_data import Request, describe_data
from rlpretrain.tools.memory import GIB, memory, peak
from rlpretrain.tools.readiness import memory_here, missing_libraries
from rlpretrain.tools.sizes import make_sizes
from rlpretrain.training.backends import backend_of
from rlpretrain.training.planning import check_baseline, check_cut, check_reference

USABLE = 0.9
"""Share of a device's memory that the estimate may take."""
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


def make_first_config(request: Request) -> FirstConfig:
    """A checked configuration for `request`.

    Raises ConfigError for documents that cannot be read, columns that cannot be guessed, an unknown
    objective, a model that is neither here nor on the hub, and a model that fits in no way.
    """
    device = request.device or ("cuda" if torch.cuda.is_available() else "cpu")
    first = FirstConfig({})
    gpu = device != "cpu"
    _describe_model(first, request, gpu)
    describe_data(first, request, most=2048 if gpu else 512)
    _describe_method(first, request, gpu)
    _describe_run(first, request, device)
    first.replace(request.fields)
    _check(first)
    _fit(first, request, device)
    return first


def _check(first: FirstConfig) -> None:
    """Refuse what a run would refuse without its model; note the libraries that are missing here."""
    config = build(first.values, config_of)
    owner, _ = parse_section(config.objective)
    check_cut(config, owner)
    check_baseline(config, owner)
    compilation.check(config, backend_of(config.policy))
    check_reference(config, make_objective(config, []))
    first.notes += missing_libraries(config, owner.has_positions)


def _describe_model(first: FirstConfig, request: Request, gpu: bool) -> None:
    first.set("model.path", request.model)
    first.set(
        "model.dtype",
        "bfloat16" if gpu else "float32",
        "with a float32 copy for the optimizer" if gpu else "processors are slow in half precision",
    )
    if gpu and request.processes == 1:
        first.set("model.compile", True, "each layer by torch.compile; the first step takes longer")
        first.set("policy.backend", "torch", "which model.compile needs")


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
    first.set("sampling.max_thought_tokens", 256 if gpu else 32, "longest thought")
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
    first.set("positions_per_step", per_step, "of an optimizer step, over all processes")
    first.set(
        "max_steps", request.steps or (1000 if gpu else 100), "a first look; the loss says when to stop"
    )
    if gpu:
        first.set("optim.lr", 1e-6, "the RLP paper's, for 1.7B parameters; small models take larger ones")
        first.set("token_budget", 16384, "tokens of a micro-batch: lower it where memory is short")
    else:
        first.set("optim.lr", 2e-5, "for a small model; the RLP paper has 1e-6 for 1.7B parameters")
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
    try:
        shape, _ = model_shape(ModelConfig(path=request.model), Path())
    except ConfigError as error:
        if _is_folder(request.model) or "valid model identifier" in str(error):
            raise
        first.notes.append(f"the memory was not estimated: {error}")
        return
    _shorten(first, shape)
    if available is None:
        first.notes.append("the memory of a GPU that is not here is not known: --gib says it")
        return
    needed = 0.0
    share = request.processes if device == "cpu" else 1  # processes on a CPU share its memory
    budget = build(first.values, config_of).token_budget
    for reason, changes, parts in SAVINGS:
        tried = overlay(first.values, changes | {"token_budget": budget // parts} if parts > 1 else changes)
        tried = overlay(tried, request.fields)  # what the user sets stays
        needed = share * _estimate(build(tried, config_of), request, shape)
        if needed <= USABLE * available:
            first.values = tried
            if reason:
                first.comments["model.gradient_checkpointing"] = reason
            if "optim" in changes and "lr" not in request.fields.get("optim", {}):
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


def _is_folder(model: str) -> bool:
    """Whether a model's name is that of a folder, there or not, and no hub id."""
    path = Path(model).expanduser()
    named = model.startswith((".", "/", "~")) or len(path.parts) > 2
    return named or path.exists() or (len(path.parts) == 2 and path.parent.is_dir())


def _shorten(first: FirstConfig, shape: Any) -> None:
    """Let documents and thoughts fit into the positions of the model."""
    limit, sampling = limit_of(shape), first.values.get("sampling")
    if limit is None:
        return
    config, room = build(first.values, config_of), limit.tokens
    if sampling:
        sampling["max_thought_tokens"] = min(config.sampling.max_thought_tokens, room // 4)
        room -= sampling["max_thought_tokens"] + 64  # tags, template and target
    if config.data.max_length > room:
        first.set("data.max_length", max(room, 1), limit.reason)


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
