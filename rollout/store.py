"""Groups on disk: a pair of parquet files for each step and rank, which read back equal to what was written.

`step-000012-rank-0.groups.parquet` holds the groups, `...documents.parquet` the documents of the step's
next-token loss. The groups are written last, so a step with a groups file is complete. Any parquet reader can
open the files; they carry a schema version.

Of documents, `meta` holds the other columns as JSON, `answer_at` the index of the answer, `scores` a number
for each token, `stream` the name of the source in a mixture. Older files lack these columns, and `given` of
thoughts, and are still read.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rollout.engine import EngineInfo
from rollout.idle import IdleEngine
from rollout.stored_rows import (
    StoreError,
    document_from_row,
    document_to_row,
    group_from_row,
    group_to_row,
    schemas,
)
from rollout.types import Document, Group, Prompt, SamplingParams, Thought

__all__ = ["Recorded", "Store", "StoreError", "document_from_row", "document_to_row"]

SCHEMA_VERSION = 1


class Store:
    """A folder of rollouts.

    `facts` (the engine's kind, whether it shares the trainer's weights, versions) are kept in every file;
    `read` gives them back. Raises StoreError for a folder without rollouts, another schema version, or a step
    that is not there.
    """

    def __init__(self, folder: str | Path, rank: int = 0):
        self.folder, self.rank = Path(folder), rank
        self.warned_about_answers = False

    def write(
        self, step: int, groups: Sequence[Group], documents: Iterable[Document], facts: Mapping[str, Any]
    ) -> None:
        """Write a step's groups and documents. A step written before is replaced."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows = {  # in the order of writing
            "documents": [document_to_row(document) for document in documents],
            "groups": [group_to_row(group) for group in groups],
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        about = {"schema_version": str(SCHEMA_VERSION), "step": str(step), "facts": json.dumps(dict(facts))}
        schema_of = schemas()
        for kind in rows:
            path = self._path(step, kind)
            work = path.with_name(f".{path.name}.tmp")
            table = pa.Table.from_pylist(rows[kind], schema=schema_of[kind].with_metadata(about))
            pq.write_table(table, work, compression="zstd")
            work.replace(path)

    def read(self, step: int) -> tuple[list[Group], list[Document], dict[str, Any]]:
        """(groups, documents, facts) of a step, as they were written."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        tables = {}
        for kind in ("groups", "documents"):
            path = self._path(step, kind)
            if not path.is_file():
                raise StoreError(self._why_missing(step, path))
            try:
                tables[kind] = pq.read_table(path)
            except (pa.ArrowException, OSError) as error:
                raise StoreError(f"{path} is not a readable parquet file: {error}") from error
            about = tables[kind].schema.metadata or {}
            version = about.get(b"schema_version", b"none").decode()
            if version != str(SCHEMA_VERSION):
                raise StoreError(
                    f"{path} has schema version {version}, this is {SCHEMA_VERSION}: read it with the "
                    "release that wrote it"
                )
        groups = [group_from_row(row) for row in tables["groups"].to_pylist()]
        if "answer_at" not in tables["documents"].column_names and not self.warned_about_answers:
            self.warned_about_answers = True
            warnings.warn(
                f"{self.folder} was written before documents kept where their answers begin: an objective "
                "that needs it (sft_mixed with ntp_data.answer_column) reads them as texts without prompts",
                stacklevel=2,
            )
        documents = [document_from_row(row) for row in tables["documents"].to_pylist()]
        return groups, documents, json.loads(tables["groups"].schema.metadata[b"facts"])

    def steps(self) -> list[int]:
        """The complete steps of this rank, in order."""
        return sorted(
            int(p.name.split("-")[1]) for p in self.folder.glob(f"step-*-rank-{self.rank}.groups.parquet")
        )

    def _path(self, step: int, kind: str) -> Path:
        return self.folder / f"step-{step:06d}-rank-{self.rank}.{kind}.parquet"

    def _why_missing(self, step: int, path: Path) -> str:
        """Why a step is not there."""
        steps = self.steps()
        if not steps:
            files = self.folder.glob("step-*.groups.parquet")
            ranks = sorted({file.name.split("-")[3].split(".")[0] for file in files})
            present = f"those of rank {', '.join(ranks)} only" if ranks else "none"
            return (
                f"no rollouts of rank {self.rank} in {self.folder} ({present}): write them with "
                "save_rollouts: true"
            )
        held = f"it holds {len(steps)} steps, {steps[0]} to {steps[-1]}"
        return f"no rollouts of step {step} in {self.folder} ({path.name}): {held}"


class Recorded(IdleEngine):
    """Stands for the engine that made stored rollouts while they are replayed; it samples nothing."""

    def __init__(self, facts: Mapping[str, Any]):
        super().__init__()
        self.facts = dict(facts)
        self.info = EngineInfo(shares_weights=bool(facts.get("shares_weights")), needs_probe=False)

    async def sample(
        self, prompts: Sequence[Prompt], params: SamplingParams, n: int, seeds: Sequence[int]
    ) -> list[list[Thought]]:
        raise RuntimeError("a replay samples nothing: this objective asks for thoughts that are not stored")

    def health(self) -> dict[str, Any]:
        return {"kind": "recorded", "version": self.version, "of": self.facts}
