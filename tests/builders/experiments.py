"""Parts of experiment files for `rlpretrain compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def small_evaluation(held_out: Path) -> dict[str, Any]:
    """Twelve documents of the dial, two thoughts of at most six tokens each."""
    return {
        "data": {"path": str(held_out), "max_length": 64},
        "documents": 12,
        "thoughts": 2,
        "objective": {"name": "rlp", "positions": "after", "marker": "shows"},
        "max_thought_tokens": 6,
    }
