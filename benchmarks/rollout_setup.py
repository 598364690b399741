"""What the parts of `benchmarks.rollout` share: a random model of Qwen3's shape, and its training runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

VOCABULARY, LONGEST = 8192, 512
SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": LONGEST,
    "tie_word_embeddings": True,
}
HIDDEN_128 = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
"""Changes of SHAPE for a smaller model."""


def make_model(folder: Path, **changes: Any) -> Any:
    """A random model, saved in `folder`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("qwen3", **{"vocab_size": VOCABULARY} | SHAPE | changes)
    )
    model.eval().save_pretrained(folder)
    return model


def train(folder: Path, name: str, documents: Path, **changes: Any) -> list[dict[str, float]]:
    """The metrics of each step of an RLP run from `folder`/base, written to `folder`/`name`."""
    from rlpretrain import Pretrainer
    from rlpretrain.config.io import build

    values: dict[str, Any] = {
        "model": f"{folder}/base",
        "data": {"path": str(documents), "max_length": 128},
        "objective": {"name": "rlp", "positions": "after", "marker": "shows"},
        "console": False,
        "checkpoint": {"every": 0},
        "output_dir": f"{folder}/{name}",
        "baseline": {"frozen_every": 0},
    }
    Pretrainer(build(values | changes)).train()
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
