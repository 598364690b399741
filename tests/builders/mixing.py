"""Runs of two sources whose shares follow their losses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rollout.store import Store
from tests.builders.runs import merged


def rows_of(folder: Any) -> list[dict[str, float]]:
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def drawn(folder: Any, ranks: int = 1) -> list[list[str]]:
    """The ids of each step's documents, over all ranks."""
    stores = [Store(Path(folder) / "rollouts", rank) for rank in range(ranks)]
    return [[d.id for store in stores for d in store.read(step)[1]] for step in stores[0].steps()]


def sources_of(corpus: Path, **weights: Any) -> dict[str, Any]:
    """Two sources of dial's documents; `read` is only read by an objective that thinks."""
    return {
        "think": {"path": str(corpus / "train.jsonl"), "weight": weights.get("think", 1.0)},
        "read": {"path": str(corpus / "base.jsonl"), "weight": weights.get("read", 1.0), "use": "read"},
    }


SKILLS = {"name": "skill_it", "edges": {"think": {"read": 0.3}}, "eta": 1.5, "window": 2, "every": 2}
RAMP = {"think": [[0, 1.0], [1, 0.2]], "read": [[0, 0.1], [1, 1.0]]}


def mixed(values: dict[str, Any], corpus: Path, held_out: bool = True, **changes: Any) -> dict[str, Any]:
    """A run whose weights begin on a ramp and follow the losses from step 2 on, with an average."""
    file = str(corpus / "held_out.jsonl")
    base = {
        "data": {"sources": sources_of(corpus, **RAMP), "max_length": 64, "mixing": SKILLS},
        "max_steps": 8,
        "checkpoint": {"every": 3, "keep": 9},
        "average": {"kind": "ema", "decay": 0.5},
        "save_rollouts": True,
        "eval": {"every": 2, "documents": 6, "thoughts": 1},
    }
    if held_out:
        base["eval"]["data"] = {"think": file, "read": file}
    return merged(values, **base | changes)
