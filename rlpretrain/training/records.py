"""What a run leaves behind in JSON: run.json, and the batches of steps that were skipped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlpretrain.files import dumps, writing
from rlpretrain.types import Document
from rollout.types import Group


@dataclass(slots=True)
class Spent:
    """What a run has spent so far, over all ranks: tokens of documents, tokens that models read,
    operations.
    """

    input_tokens: int = 0
    tokens: int = 0
    flops: float = 0.0

    def add(self, documents: float, tokens: float, flops: float) -> None:
        """What a step took; rlpretrain/models/spending.py says what is counted."""
        self.input_tokens += int(documents)
        self.tokens += int(tokens)
        self.flops += flops

    def row(self) -> dict[str, float]:
        """As it is logged."""
        return {f"num_{name}": value for name, value in asdict(self).items()}

    def over(self, input_tokens: int | None, flops: float | None) -> str | None:
        """Which of two limits is reached."""
        if input_tokens is not None and self.input_tokens >= input_tokens:
            return f"budget: {self.input_tokens} tokens of documents"
        return f"budget: {self.flops:.4g} operations" if flops is not None and self.flops >= flops else None


def write_json(path: Path, record: Any) -> None:
    """Write aside, then rename. What is not a finite number becomes null."""
    work = path.with_name(f".{path.name}.tmp")
    with writing(path):
        try:
            work.write_text(dumps(record, indent=1, default=str))
            work.replace(path)
        except OSError:
            work.unlink(missing_ok=True)
            raise


def keep_batch(
    folder: Path,
    step: int,
    rank: int,
    reason: str | None,
    groups: Sequence[Group],
    documents: Sequence[Document],
) -> None:
    """Keep the batch of a step with NaN or inf under `folder`/nonfinite."""
    with writing(folder / "nonfinite"):
        (folder / "nonfinite").mkdir(parents=True, exist_ok=True)
    kept = {
        "step": step,
        "reason": reason,
        "groups": [asdict(g) for g in groups],
        "documents": [asdict(d) for d in {d.id: d for d in documents}.values()],
    }
    write_json(folder / "nonfinite" / f"step-{step}-rank-{rank}.json", kept)


def nothing_learnt(stopped: str | None, skipped: int, steps: int, folder: Path) -> str | None:
    """Why a run has no model worth saving: it stopped at NaN or inf, or skipped every step."""
    if stopped and stopped.startswith("nonfinite"):
        return stopped
    if not skipped or skipped < steps:
        return None
    return (
        f"nonfinite: all {steps} steps were skipped, so no model is saved: its weights would be those of the "
        f"beginning; the batches are in {folder / 'nonfinite'}"
    )
