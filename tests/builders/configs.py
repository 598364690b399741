"""Small configurations, and their models and data on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml


def written(values: dict[str, Any], tmp_path: Path) -> str:
    """`values` as a YAML file."""
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(values))
    return str(file)


def tiny_values(corpus: Path, output_dir: Path) -> dict[str, Any]:
    """A complete small RLP configuration as plain values."""
    return {
        "model": str(corpus / "base"),
        "data": {"path": str(corpus / "train.jsonl"), "max_length": 64},
        "objective": {"name": "rlp", "positions": "after", "marker": "shows"},
        "sampling": {"thoughts": 4, "max_thought_tokens": 6, "cut": "force_close"},
        "positions_per_step": 4,
        "optim": {"lr": 1e-2, "warmup_steps": 2},
        "policy": {"backend": "torch"},
        "max_steps": 3,
        "checkpoint": {"every": 0},
        "stop": {"collapse": False},
        "baseline": {"name": "self", "frozen_every": 0},
        "console": False,
        "output_dir": str(output_dir),
        "device": "cpu",
    }
