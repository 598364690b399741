"""The shape of models that vLLM has kernels for, and the metrics of a run."""

from __future__ import annotations

import json
from pathlib import Path

SHAPE = {
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "initializer_range": 0.1,
    "max_position_embeddings": 512,
}


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
