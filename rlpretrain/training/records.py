"""JSON files of a run: run.json, and the batches of skipped steps."""

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
    """Tokens and floating-point operations of a run so far, over all ranks."""

    input_tokens: int = 0
    """Tokens of documents."""
    tokens: int = 0
    """Tokens that models read."""
    flops: float = 0.0

    def add(self, documents: float, tokens: float, flops: float) -> None:
        """Add a step's numbers; rlpretrain/models/spending.py defines what is counted."""
        self.input_tokens += int(documents)
        self.tokens += int(tokens)
        self.flops += flops

    def row(self) -> dict[str, float]:
        """The metrics of the log."""
        return {f"num_{name}": value for name, value in asdict(self).items()}

    def over(self, input_tokens: int | None, flops: float | None) -> str | None:
        """The limit that is reached, as a text; None if neither is."""
        if input_tokens is not None and self.input_tokens >= input_tokens:
            return f"budget: {self.input_tokens} tokens of documents"
        return f"budget: {self.flops:.4g} operations" if flops is not None and self.flops >= flops else None


def write_json(path: Path, record: Any) -> None:
    """Write to a temporary name, then rename. NaN and inf become null."""
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
    """Store the batch of a step with NaN or inf under `folder`/nonfinite."""
    with writing(folder / "nonfinite"):
        (folder / "nonfinite").mkdir(parents=True, exist_ok=True)
    distinct = {document.id: document for document in documents}
    kept = {
        "step": step,
        "reason": reason,
        "groups": [asdict(group) for group in groups],
        "documents": [asdict(document) for document in distinct.values()],
    }
    write_json(folder / "nonfinite" / f"step-{step}-rank-{rank}.json", kept)


def nothing_learnt(stopped: str | None, skipped: int, steps: int, folder: Path) -> str | None:
    """Why no model is saved: the run stopped at NaN or inf, or skipped every step; else None."""
    if stopped and stopped.startswith("nonfinite"):
        return stopped
    if not skipped or skipped < steps:
        return None
    return (
        f"nonfinite: all {steps} steps were skipped, so no model is saved: its weights have not changed. The "
        f"batches are in {folder / 'nonfinite'}"
    )
