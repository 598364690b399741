"""Groups on disk: parquet files with a schema version, one pair a step and rank, that read back equal to what was written.

`step-000012-rank-0.groups.parquet` holds the groups, `...documents.parquet` the documents of the step's next-token loss. The
groups are written last, so a step whose groups are there is whole. Any parquet reader can open them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rollout.types import FinishReason, Group, Position, Prompt, Thought

SCHEMA_VERSION = 1


class StoreError(ValueError):
    """Rollouts on disk that cannot be used; the message says which file and why."""


def _schemas() -> tuple[Any, Any]:
    """(groups, documents): the arrow schemas. Ids are int32, log-probs and rewards float64, so nothing is rounded."""
    import pyarrow as pa

    ids = pa.list_(pa.int32())
    position = pa.struct({"document_id": pa.string(), "index": pa.int64(), "context_ids": ids, "target_ids": ids,
                          "suffix_ids": ids})  # fmt: skip
    prompt = pa.struct({"token_ids": ids, "stop_ids": ids, "close_ids": ids, "join_ids": ids,
                        "stop_strings": pa.list_(pa.string())})  # fmt: skip
    thought = pa.struct({"token_ids": ids, "behaviour_logps": pa.list_(pa.float64()), "finish_reason": pa.string(),
                         "policy_version": pa.int64(), "seed": pa.int64(), "answer_span": pa.list_(pa.int64())})  # fmt: skip
    groups = pa.schema({"id": pa.string(), "position": position, "prompt": prompt, "thoughts": pa.list_(thought),
                        "policy_version": pa.int64(), "parent_id": pa.string(), "role": pa.string(),
                        "rewards": pa.list_(pa.float64()), "extra": pa.string()})  # fmt: skip
    documents = pa.schema({"id": pa.string(), "token_ids": ids, "source": pa.string()})
    return groups, documents


class Store:
    """A folder of rollouts.

    `facts` (the engine's kind, whether it shares the trainer's weights, versions) are kept in every file; `read` gives them
    back. Raises StoreError for a folder without rollouts, another schema version, or a step that is not there.
    """

    def __init__(self, folder: str | Path, rank: int = 0):
        self.folder, self.rank = Path(folder), rank

    def write(self, step: int, groups: Sequence[Group], documents: Iterable[tuple[str, Sequence[int], str]],
              facts: Mapping[str, Any]) -> None:  # fmt: skip
        """Keep a step's groups, and its documents as (id, token ids, source). A step written before is replaced."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        group_schema, document_schema = _schemas()
        rows = {
            "documents": ([{"id": i, "token_ids": ids, "source": source} for i, ids, source in documents], document_schema),
            "groups": ([asdict(g) | {"extra": json.dumps(g.extra)} for g in groups], group_schema),
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        about = {"schema_version": str(SCHEMA_VERSION), "step": str(step), "facts": json.dumps(dict(facts))}
        for kind, (found, schema) in rows.items():
            path = self._path(step, kind)
            work = path.with_name(f".{path.name}.tmp")
            pq.write_table(pa.Table.from_pylist(found, schema=schema.with_metadata(about)), work, compression="zstd")
            work.replace(path)

    def read(self, step: int) -> tuple[list[Group], list[tuple[str, tuple[int, ...], str]], dict[str, Any]]:
        """(groups, documents, facts) of a step, as they were written."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        tables = {}
        for kind in ("groups", "documents"):
            path = self._path(step, kind)
            if not path.is_file():
                raise StoreError(self._why(step, path))
            try:
                tables[kind] = pq.read_table(path)
            except (pa.ArrowException, OSError) as error:
                raise StoreError(f"{path} is not a readable parquet file: {error}") from error
            about = tables[kind].schema.metadata or {}
            version = about.get(b"schema_version", b"none").decode()
            if version != str(SCHEMA_VERSION):
                raise StoreError(f"{path} has schema version {version}, this is {SCHEMA_VERSION}: read it with the release "
                                 "that wrote it")  # fmt: skip
        groups = [_group(row) for row in tables["groups"].to_pylist()]
        documents = [(d["id"], tuple(d["token_ids"]), d["source"]) for d in tables["documents"].to_pylist()]
        return groups, documents, json.loads(tables["groups"].schema.metadata[b"facts"])

    def cut(self, step: int) -> None:
        """Forget what this rank wrote after `step`: a run that goes on from there writes it again."""
        for later in (s for s in self.steps() if s > step):
            for kind in ("groups", "documents"):  # the groups first: a step without them is none
                self._path(later, kind).unlink(missing_ok=True)

    def steps(self) -> list[int]:
        """The steps that are whole, for this rank, in order."""
        return sorted(int(p.name.split("-")[1]) for p in self.folder.glob(f"step-*-rank-{self.rank}.groups.parquet"))

    def _path(self, step: int, kind: str) -> Path:
        return self.folder / f"step-{step:06d}-rank-{self.rank}.{kind}.parquet"

    def _why(self, step: int, path: Path) -> str:
        steps = self.steps()
        if not steps:
            ranks = sorted({p.name.split("-")[3].split(".")[0] for p in self.folder.glob("step-*.groups.parquet")})
            there = f"those of rank {', '.join(ranks)} only" if ranks else "none"
            return f"no rollouts of rank {self.rank} in {self.folder} ({there}): write them with save_rollouts: true"
        held = f"it holds {len(steps)} steps, {steps[0]} to {steps[-1]}"
        return f"no rollouts of step {step} in {self.folder} ({path.name}): {held}"


class Recorded:
    """Stands for the engine that made stored rollouts, while they are trained on again: it has a version and samples nothing."""

    def __init__(self, facts: Mapping[str, Any]):
        self.facts, self.version = dict(facts), 0
        self.shares_weights = bool(facts.get("shares_weights"))

    async def sample(self, *request: Any) -> Any:
        raise RuntimeError("a replay samples nothing: this objective asks for thoughts that are not stored")

    def sync(self, weights: Any, version: int) -> None:
        """Note the version; the weights go nowhere."""
        self.version = version

    def health(self) -> dict[str, Any]:
        return {"kind": "recorded", "version": self.version, "of": self.facts}

    def close(self) -> None:
        """Nothing to release."""


def _group(row: dict[str, Any]) -> Group:
    position = row["position"]
    thoughts = tuple(
        Thought(tuple(t["token_ids"]), tuple(t["behaviour_logps"]), FinishReason(t["finish_reason"]), t["policy_version"],
                t["seed"], tuple(t["answer_span"]) if t["answer_span"] is not None else None)
        for t in row["thoughts"]
    )  # fmt: skip
    place = Position(position["document_id"], position["index"],
                     *(tuple(position[k]) for k in ("context_ids", "target_ids", "suffix_ids")))  # fmt: skip
    return Group(row["id"], place, Prompt(**{k: tuple(v) for k, v in row["prompt"].items()}), thoughts, row["policy_version"],
                 row["parent_id"], row["role"], tuple(row["rewards"]) if row["rewards"] is not None else None,
                 json.loads(row["extra"]))  # fmt: skip
