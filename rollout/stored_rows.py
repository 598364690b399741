"""Groups and documents as rows of a table, and back."""

from __future__ import annotations

import base64
import datetime
import decimal
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from rollout.types import Document, FinishReason, Group, Position, Prompt, Thought


class StoreError(ValueError):
    """Rollouts on disk that cannot be used; the message says which file and why."""


def schemas() -> dict[str, Any]:
    """The arrow schemas of `groups` and `documents`.

    Ids are int32, log-probs and rewards float64, so nothing is rounded.
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
            "given": pa.bool_(),
            "updates": pa.list_(pa.list_(pa.int64())),
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
            "stream": pa.string(),
        }
    )
    return {"groups": groups, "documents": documents}


def document_to_row(document: Document) -> dict[str, Any]:
    """A document as numbers and strings, for a store or a checkpoint.

    Raises StoreError for a value in `meta` that neither JSON nor `_KINDS` can write (an image, an object).
    """
    return {
        "id": document.id,
        "token_ids": document.token_ids,
        "source": document.source,
        "meta": None if document.meta is None else _meta_to_json(document),
        "answer_at": document.answer_at,
        "scores": document.scores,
        "stream": document.stream,
    }


def document_from_row(row: Mapping[str, Any]) -> Document:
    """The document that `document_to_row` wrote; older rows lack some of the last columns."""
    meta, scores = row.get("meta"), row.get("scores")
    return Document(
        row["id"],
        tuple(row["token_ids"]),
        row["source"],
        None if meta is None else json.loads(meta, object_hook=_unmarked),
        row.get("answer_at"),
        None if scores is None else tuple(scores),
        row.get("stream") or "",
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
"""Types that JSON lacks: name, (type, to JSON, from JSON). A datetime is a date too, so it comes first."""
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


def _unmarked(value: dict[str, Any]) -> Any:
    return _KINDS[value[_MARK]][2](value["value"]) if value.keys() == {_MARK, "value"} else value


def group_to_row(group: Group) -> dict[str, Any]:
    """A group as a row of a store."""
    return asdict(group) | {"extra": json.dumps(group.extra)}


def group_from_row(row: dict[str, Any]) -> Group:
    """The group that `group_to_row` wrote."""
    position = row["position"]
    return Group(
        id=row["id"],
        position=Position(
            document_id=position["document_id"],
            index=position["index"],
            context_ids=tuple(position["context_ids"]),
            target_ids=tuple(position["target_ids"]),
            suffix_ids=tuple(position["suffix_ids"]),
        ),
        prompt=Prompt(**{name: tuple(values) for name, values in row["prompt"].items()}),
        thoughts=tuple(_thought(thought) for thought in row["thoughts"]),
        policy_version=row["policy_version"],
        parent_id=row["parent_id"],
        role=row["role"],
        rewards=None if row["rewards"] is None else tuple(row["rewards"]),
        extra=json.loads(row["extra"]),
    )


def _thought(row: dict[str, Any]) -> Thought:
    span = row["answer_span"]
    return Thought(
        token_ids=tuple(row["token_ids"]),
        behaviour_logps=tuple(row["behaviour_logps"]),
        finish_reason=FinishReason(row["finish_reason"]),
        policy_version=row["policy_version"],
        seed=row["seed"],
        answer_span=None if span is None else (span[0], span[1]),
        given=bool(row.get("given")),  # older rows lack it, and the next
        updates=tuple((index, version) for index, version in row.get("updates") or ()),
    )
