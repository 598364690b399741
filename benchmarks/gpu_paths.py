"""The part of `benchmarks.gpu` that runs each path of the library that a GPU takes, on a small model."""

from __future__ import annotations

import importlib.util
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_shapes import Cell, Report, Settings, measuring, peak_gib
from tests.builders.configs import tiny_values

STEPS = 4
VLLM: dict[str, Any] = {"name": "vllm_local", "kv_cache_gib": 1.0, "options": {"enforce_eager": True}}
PATHS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16 weights with float32 copies": {"model": {"dtype": "bfloat16"}},
    "bfloat16 autocast": {"policy": {"autocast": "bfloat16"}},
    "padded rows": {"packing": "padded"},
    "compiled layers": {"model": {"compile": True}},
    "recomputed activations": {"model": {"gradient_checkpointing": True}},
    "offloaded activations": {"model": {"gradient_checkpointing": True, "activation_offloading": True}},
    "LoRA": {"policy": {"lora": {"r": 4}}},
    "moving average as baseline": {"baseline": {"name": "ema"}},
    "an average of the weights": {"average": {"kind": "ema"}},
    "Muon": {"optim": {"name": "muon"}},
    "vLLM": {"engine": VLLM},
    "vLLM that sleeps while the model trains": {"engine": VLLM | {"sleep": True}},
    "vLLM, an adapter": {
        "engine": VLLM | {"dtype": "bfloat16"},
        "model": {"dtype": "bfloat16"},
        "policy": {"lora": {"r": 4, "sync": "adapter"}},
    },
    "8-bit AdamW": {"optim": {"name": "adamw_8bit"}},
    "LoRA on a base in eight bits": {"model": {"quantization": "8bit"}, "policy": {"lora": {"r": 4}}},
    "LoRA on a base in four bits": {"model": {"quantization": "4bit"}, "policy": {"lora": {"r": 4}}},
    "FSDP 2": {"policy": {"backend": "fsdp"}},
    "FSDP 2, LoRA": {"policy": {"backend": "fsdp", "lora": {"r": 4}}},
    "FSDP 2, bfloat16": {"policy": {"backend": "fsdp"}, "model": {"dtype": "bfloat16"}},
    "DeepSpeed ZeRO 0": {"policy": {"backend": "deepspeed", "zero_stage": 0}},
    "DeepSpeed ZeRO 2": {"policy": {"backend": "deepspeed", "zero_stage": 2}},
    "DeepSpeed ZeRO 3": {"policy": {"backend": "deepspeed", "zero_stage": 3}},
}
"""Changes of the configuration; the first is what exact ones are compared with."""
EXACT = (
    "padded rows",
    "compiled layers",
    "recomputed activations",
    "offloaded activations",
    "FSDP 2",
    *(name for name in PATHS if name.startswith("DeepSpeed")),
)
"""Paths that compute the same numbers as the first, up to rounding."""
ON_A_CPU = ("float32", "padded rows", "LoRA")
"""Paths of a test of the code: the tests of the library run all of them on a CPU."""
NEEDS = {name: "peft" for name in PATHS if "LoRA" in name}
NEEDS |= {name: "bitsandbytes" for name in PATHS if "bits" in name or "8-bit" in name}
NEEDS |= {name: "deepspeed" for name in PATHS if name.startswith("DeepSpeed")}
NEEDS |= {name: "vllm" for name in PATHS if name.startswith("vLLM")}
"""Packages that a path needs; without them it is left out."""
LARGEST = 1e-4
"""Of a difference between weights of exact paths; four steps at a rate of 1e-3 move them by up to 4e-3."""


def measure_paths(settings: Settings, report: Report) -> None:
    """Some steps of RLP on each path, and a resume."""
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(folder)
        reference: dict[str, torch.Tensor] | None = None
        paths = {path: PATHS[path] for path in ON_A_CPU} if settings.tiny else PATHS
        for path, changes in paths.items():
            cell = Cell(path)
            if (needed := NEEDS.get(path)) and importlib.util.find_spec(needed) is None:
                cell.status = f"{needed} is not installed"
            elif time.perf_counter() - begin > 0.85 * settings.seconds:
                cell.status = "no time left"
            else:
                with measuring(cell):
                    weights = train_path(settings, folder, path, changes, cell)
                    reference = weights if reference is None else reference
                    if path in EXACT:
                        _compare(cell, weights, reference)
            report(cell)
        cell = Cell("resume after half of the steps")
        with measuring(cell):
            whole, again = folder / _name_of("float32"), folder / "resumed"
            again.mkdir()
            (whole / f"checkpoint-{STEPS // 2}").rename(again / f"checkpoint-{STEPS // 2}")
            weights = train_path(settings, folder, "resumed", {}, cell, resume="auto")
            assert reference is not None, "the first path has failed"
            _compare(cell, weights, reference)
        report(cell)


def train_path(
    settings: Settings, folder: Path, path: str, changes: dict[str, Any], cell: Cell, resume: Any = None
) -> dict[str, torch.Tensor]:
    """Train, fill in the cell and return the weights of the trained model."""
    from safetensors.torch import load_file

    from rlpretrain import Pretrainer
    from rlpretrain.config.io import build

    out = folder / _name_of(path)
    values = tiny_values(folder, out) | {
        "model": {"path": str(folder / "base")},
        "optim": {"lr": 1e-3, "warmup_steps": 0},
        "max_steps": STEPS,
        "checkpoint": {"every": STEPS // 2, "keep": 2},
        "baseline": {"name": "self"},
        "eval": {"data": str(folder / "held_out.jsonl"), "documents": 8, "every": STEPS},
        "device": settings.device,
    }
    for section, value in changes.items():
        values[section] = (
            {**values[section], **value} if section in values and isinstance(value, dict) else value
        )
    peak_gib(settings, reset=True)
    begin = time.perf_counter()
    Pretrainer(build(values)).train(resume=resume)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    if not (losses and all(map(math.isfinite, losses))):
        raise ValueError(f"losses {losses}")
    cell.values = {
        "seconds": time.perf_counter() - begin,
        "loss": losses[-1],
        "memory_gib": peak_gib(settings),
    }
    saved = sorted((out / "model").glob("*.safetensors"))
    return {name: x.float() for file in saved for name, x in load_file(file).items()}


def _compare(cell: Cell, weights: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> None:
    """Write the largest difference into the cell; ValueError if it is not rounding."""
    apart = max(float((weights[name] - x).abs().max()) for name, x in reference.items())
    cell.values["apart"] = apart
    if not apart <= LARGEST:
        raise ValueError(f"weights differ by up to {apart:.1e} from those of the first path")


def _name_of(path: str) -> str:
    return path.replace(" ", "-")


def write_inputs(folder: Path) -> None:
    """A small corpus, and a random Qwen3 of its vocabulary whose heads are wide enough for FlexAttention."""
    from rlpretrain.corpora import dial
    from tests.builders.tiny import tiny_model

    dial.write(folder, base=64, train=64, held_out=16)
    base = folder / "base"
    heads = {"hidden_size": 64, "head_dim": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    tiny_model("qwen3", vocab_size=len(dial.WORDS), seed=3, **heads).save_pretrained(base)
    dial.tokenizer().save_pretrained(base)
