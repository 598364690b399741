"""JSON that any reader takes: NaN and infinity, which JSON does not have, are written as null."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


def finite(record: Any) -> Any:
    """The record with None in place of every float that is NaN or infinite, at any depth; tuples become lists.

    >>> finite({"gain": float("nan"), "ci": (0.5, float("inf"))})
    {'gain': None, 'ci': [0.5, None]}
    """
    if isinstance(record, float):
        return record if math.isfinite(record) else None
    if isinstance(record, Mapping):
        return {key: finite(value) for key, value in record.items()}
    if isinstance(record, list | tuple):
        return [finite(value) for value in record]
    return record


def dumps(record: Any, **options: Any) -> str:
    """`json.dumps` of the finite record; what is written is JSON, or nothing is."""
    return json.dumps(finite(record), allow_nan=False, **options)
