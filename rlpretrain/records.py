"""What a run leaves behind in JSON: run.json, and the batches of steps that were skipped."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlpretrain.types import Document
from rollout.types import Group


def write_json(path: Path, record: Any) -> None:
    """Write aside, then rename."""
    work = path.with_name(f".{path.name}.tmp")
    work.write_text(json.dumps(record, indent=1, default=str))
    work.replace(path)


def keep_batch(folder: Path, step: int, rank: int, reason: str | None, groups: Sequence[Group],
               documents: Sequence[Document]) -> None:  # fmt: skip
    """Keep the batch of a step with NaN or inf under `folder`/nonfinite."""
    (folder / "nonfinite").mkdir(parents=True, exist_ok=True)
    kept = {"step": step, "reason": reason, "groups": [asdict(g) for g in groups],
            "documents": [asdict(d) for d in {d.id: d for d in documents}.values()]}  # fmt: skip
    write_json(folder / "nonfinite" / f"step-{step}-rank-{rank}.json", kept)
