"""Groups on disk: parquet files with a schema version, one pair a step and rank, that read back equal to what
was written.

`step-000012-rank-0.groups.parquet` holds the groups, `...documents.parquet` the documents of the step's
next-token loss. The groups are written last, so a step whose groups are there is whole. Any parquet reader
can open them.

Documents are kept whole: their other columns as JSON in `meta`, where the answer begins in `answer_at`. Files
of before these two columns are read without.
"""

from __future__ import annotations

import base64
import datetime
import decimal
import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rollout.types import Document, FinishReason, Group, Position, Prompt, Thought

SCHEMA_VERSION = 1


class StoreError(ValueError):
    """Rollouts on disk that cannot be used; the message says which file and why."""


def _schemas() -> tuple[Any, Any]:
    """(groups, documents): the arrow schemas. Ids are int32, log-probs and rewards float64, so nothing is
    rounded.
    """
    import pyarrow as pa

    ids = pa.list_(pa.int32())
    position = pa.struct(
        {
            "document_id": pa.string(),
            "index": pa.int64(),
            "context_ids": ids,
            "target_ids": ids,
            "suffix_ids": ids,
        }
    )
    prompt = pa.struct(
        {
            "token_ids": ids,
            "stop_ids": ids,
            "close_ids": ids,
            "join_ids": ids,
            "stop_strings": pa.list_(pa.string()),
        }
    )
    thought = pa.struct(
        {
            "token_ids": ids,
            "behaviour_logps": pa.list_(pa.float64()),
            "finish_reason": pa.string(),
            "policy_version": pa.int64(),
            "seed": pa.int64(),
            "answer_span": pa.list_(pa.int64()),
        }
    )
    groups = pa.schema(
        {
            "id": pa.string(),
            "position": position,
            "prompt": prompt,
            "thoughts": pa.list_(thought),
            "policy_version": pa.int64(),
            "parent_id": pa.string(),
            "role": pa.string(),
            "rewards": pa.list_(pa.float64()),
            "extra": pa.string(),
        }
    )
    documents = pa.schema(
        {
            "id": pa.string(),
            "token_ids": ids,
            "source": pa.string(),
            "meta": pa.string(),
            "answer_at": pa.int64(),
            "scores": pa.list_(pa.float64()),
        }
    )
    return groups, documents


class Store:
    """A folder of rollouts.

    `facts` (the engine's kind, whether it shares the trainer's weights, versions) are kept in every file;
    `read` gives them back. Raises StoreError for a folder without rollouts, another schema version, or a step
    that is not there.
    """

    def __init__(self, folder: str | Path, rank: int = 0):
        self.folder, self.rank = Path(folder), rank
        self.told = False  # of files that are older than a column

    def write(
        self, step: int, groups: Sequence[Group], documents: Iterable[Document], facts: Mapping[str, Any]
    ) -> None:
        """Keep a step's groups and its documents. A step written before is replaced."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        group_schema, document_schema = _schemas()
        rows = {
            "documents": ([document_to_row(document) for document in documents], document_schema),
            "groups": ([asdict(g) | {"extra": json.dumps(g.extra)} for g in groups], group_schema),
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        about = {"schema_version": str(SCHEMA_VERSION), "step": str(step), "facts": json.dumps(dict(facts))}
        for kind, (found, schema) in rows.items():
            path = self._path(step, kind)
            work = path.with_name(f".{path.name}.tmp")
            pq.write_table(
                pa.Table.from_pylist(found, schema=schema.with_metadata(about)), work, compression="zstd"
            )
            work.replace(path)

    def read(self, step: int) -> tuple[list[Group], list[Document], dict[str, Any]]:
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
                raise StoreError(
                    f"{path} has schema version {version}, this is {SCHEMA_VERSION}: read it with the "
                    "release that wrote it"
                )
        groups = [_group(row) for row in tables["groups"].to_pylist()]
        if "answer_at" not in tables["documents"].column_names and not self.told:
            self.told = True
            warnings.warn(
                f"{self.folder} was written before documents kept where their answers begin: to an objective "
                "that asks (sft_mixed with ntp_data.answer_column) they are texts without prompts",
                stacklevel=2,
            )
        documents = [document_from_row(row) for row in tables["documents"].to_pylist()]
        return groups, documents, json.loads(tables["groups"].schema.metadata[b"facts"])

    def cut(self, step: int) -> None:
        """Forget what this rank wrote after `step`: a run that goes on from there writes it again."""
        for later in (s for s in self.steps() if s > step):
            for kind in ("groups", "documents"):  # the groups first: a step without them is none
                self._path(later, kind).unlink(missing_ok=True)

    def steps(self) -> list[int]:
        """The steps that are whole, for this rank, in order."""
        return sorted(
            int(p.name.split("-")[1]) for p in self.folder.glob(f"step-*-rank-{self.rank}.groups.parquet")
        )

    def _path(self, step: int, kind: str) -> Path:
        return self.folder / f"step-{step:06d}-rank-{self.rank}.{kind}.parquet"

    def _why(self, step: int, path: Path) -> str:
        steps = self.steps()
        if not steps:
            ranks = sorted(
                {p.name.split("-")[3].split(".")[0] for p in self.folder.glob("step-*.groups.parquet")}
            )
            there = f"those of rank {', '.join(ranks)} only" if ranks else "none"
            return (
                f"no rollouts of rank {self.rank} in {self.folder} ({there}): write them with "
                "save_rollouts: true"
            )
        held = f"it holds {len(steps)} steps, {steps[0]} to {steps[-1]}"
        return f"no rollouts of step {step} in {self.folder} ({path.name}): {held}"


class Recorded:
    """Stands for the engine that made stored rollouts, while they are trained on again: it has a version
    and samples nothing.
    """

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


def document_to_row(document: Document) -> dict[str, Any]:
    """A document as numbers and texts: a row of a store, a part of a checkpoint.

    Raises StoreError for a value in `meta` that neither JSON nor `_KINDS` can write (an image, an object).
    """
    return {
        "id": document.id,
        "token_ids": document.token_ids,
        "source": document.source,
        "meta": None if document.meta is None else _meta_to_json(document),
        "answer_at": document.answer_at,
        "scores": document.scores,
    }


def document_from_row(row: Mapping[str, Any]) -> Document:
    """The document that `document_to_row` wrote; older rows lack `meta`, `answer_at`, `scores`."""
    meta, scores = row.get("meta"), row.get("scores")
    return Document(
        row["id"],
        tuple(row["token_ids"]),
        row["source"],
        None if meta is None else json.loads(meta, object_hook=_plain),
        row.get("answer_at"),
        None if scores is None else tuple(scores),
    )


_KINDS: dict[str, tuple[type, Any, Any]] = {
    "datetime": (datetime.datetime, datetime.datetime.isoformat, datetime.datetime.fromisoformat),
    "date": (datetime.date, datetime.date.isoformat, datetime.date.fromisoformat),
    "time": (datetime.time, datetime.time.isoformat, datetime.time.fromisoformat),
    "seconds": (
        datetime.timedelta,
        lambda v: [v.days, v.seconds, v.microseconds],
        lambda v: datetime.timedelta(*v),
    ),
    "decimal": (decimal.Decimal, str, decimal.Decimal),
    "bytes": (bytes, lambda v: base64.b64encode(v).decode(), base64.b64decode),
}
"""Types of columns that JSON lacks: name, (type, to JSON, back). Datetimes come first, as they are dates
too.
"""
_MARK = "rlpretrain type"


def _meta_to_json(document: Document) -> str:
    def marked(value: Any) -> Any:
        for name, (kind, out, _) in _KINDS.items():
            if isinstance(value, kind):
                return {_MARK: name, "value": out(value)}
        raise StoreError(
            f"document {document.id} ({document.source}): its meta holds a {type(value).__name__}, which "
            "cannot be kept: leave that column out of meta_columns"
        )

    return json.dumps(document.meta, default=marked)


def _plain(value: dict[str, Any]) -> Any:
    return _KINDS[value[_MARK]][2](value["value"]) if value.keys() == {_MARK, "value"} else value


def _group(row: dict[str, Any]) -> Group:
    position = row["position"]
    thoughts = tuple(
        Thought(
            tuple(t["token_ids"]),
            tuple(t["behaviour_logps"]),
            FinishReason(t["finish_reason"]),
            t["policy_version"],
            t["seed"],
            tuple(t["answer_span"]) if t["answer_span"] is not None else None,
        )
        for t in row["thoughts"]
    )
    place = Position(
        position["document_id"],
        position["index"],
        *(tuple(position[k]) for k in ("context_ids", "target_ids", "suffix_ids")),
    )
    return Group(
        row["id"],
        place,
        Prompt(**{k: tuple(v) for k, v in row["prompt"].items()}),
        thoughts,
        row["policy_version"],
        row["parent_id"],
        row["role"],
        tuple(row["rewards"]) if row["rewards"] is not None else None,
        json.loads(row["extra"]),
    )
