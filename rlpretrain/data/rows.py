"""Rows of local .txt, .jsonl, .json, .csv and .tsv files as they stand there, whatever their cells look like.

Readers that guess the type of a column take a text for a date, a number or a missing value. Here a JSON value
is what JSON says, and a text column of a table is text. Each cell goes on as JSON, so that a column may hold
anything.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pandas as pd
from fsspec.implementations.local import LocalFileSystem

from rlpretrain.config import ConfigError

VERSION = 1
"""Of the cells: another one makes what `datasets` has cached unused."""
COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
LOOKED_AT = 1000
"""Rows whose columns count as those of the file."""
BOM = b"\xef\xbb\xbf"


def read_rows(
    files: list[str], kind: str, columns: Sequence[str], texts: Sequence[str], mark: Any = None
) -> Iterator[Any]:
    """The rows of files of one kind, each a column → JSON. `texts` are those of the columns that hold text.

    ConfigError, with file and line, for what cannot be read. `mark` is what else tells these files from
    others.
    """
    for file in files:
        for row in READERS[kind](file, texts, columns):
            yield {name: json.dumps(row.get(name)) for name in columns}


def columns_of(files: Sequence[str], kind: str) -> list[str]:
    """The columns of the first file that has rows; none where none has."""
    for file in files:
        rows = list(islice(READERS[kind](file, (), None), LOOKED_AT))
        if rows:
            return list(dict.fromkeys(name for row in rows for name in row))
    return []


def _lines(file: str, texts: Sequence[str], columns: Any) -> Iterator[dict[str, Any]]:
    for number, line in _raw_lines(file):
        for text in _decoded(file, number, line.removesuffix(b"\n").removesuffix(b"\r")).split("\r"):
            yield {"text": text}


def _json(file: str, texts: Sequence[str], columns: Any) -> Iterator[dict[str, Any]]:
    lines = ((number, line) for number, line in _raw_lines(file) if line.strip())
    for count, (number, line) in enumerate(lines):
        text = _decoded(file, number, line)
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            value = _whole(file) if not count or text.lstrip()[:1] == "[" else None
            if value is None:
                shown = f"{text.strip()[:80]!r}"
                raise ConfigError(
                    f"{file}:{number}: not JSON: {error.msg} at column {error.colno}: {shown}"
                ) from error
            yield from _rows(file, value)
            return
        if isinstance(value, list) and not count:
            yield from _rows(file, value)
        elif isinstance(value, dict):
            yield value
        else:
            raise ConfigError(f"{file}:{number}: not a JSON object with columns but {text.strip()[:80]!r}")


def _whole(file: str) -> Any:
    """One JSON value over all lines of a file; None where the file is none."""
    with _opened(file) as f:
        data = f.read().removeprefix(BOM)
    try:
        return json.loads(data)
    except json.JSONDecodeError as error:
        if data.lstrip()[:1] == b"[":
            raise ConfigError(f"cannot read {file}: not JSON: {error}") from error
        return None


def _rows(file: str, value: Any) -> Iterator[dict[str, Any]]:
    """The rows of one JSON value: a list of rows or of texts, columns of one length, or one row."""
    if isinstance(value, dict):
        lists = list(value.values())
        table = lists and all(isinstance(x, list) for x in lists) and len(set(map(len, lists))) == 1
        yield from (
            [dict(zip(value, row, strict=True)) for row in zip(*lists, strict=True)] if table else [value]
        )
        return
    for row in value if isinstance(value, list) else [value]:
        if not isinstance(row, dict | str):
            raise ConfigError(f"{file}: not a JSON object with columns but {json.dumps(row)[:80]}")
        yield {"text": row} if isinstance(row, str) else row


def _csv(file: str, texts: Sequence[str], columns: Any) -> Iterator[dict[str, Any]]:
    """Texts are what their cells say, NA and null too. In other columns an empty cell is nothing."""
    with _opened(file) as f:
        beginning = f.read(1 << 16)
    if not beginning.removeprefix(BOM).strip():
        return
    separator = "\t" if ".tsv" in [s.lower() for s in Path(file).suffixes] else ","
    wanted = None if columns is None else columns.__contains__
    with _opened(file) as f:
        header = list(pd.read_csv(f, sep=separator, encoding="utf-8-sig", nrows=0).columns)
    empty = {name: [""] for name in header if name not in texts}
    with _opened(file) as f:
        chunks = pd.read_csv(
            f,
            sep=separator,
            encoding="utf-8-sig",
            chunksize=10_000,
            usecols=wanted,
            dtype=dict.fromkeys(texts, str),
            keep_default_na=False,
            na_values=empty,
        )
        for chunk in chunks:
            for row in chunk.astype(object).to_dict("records"):
                yield {name: _plain(value) for name, value in row.items()}


def _plain(value: Any) -> Any:
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and value != value else value


def _raw_lines(file: str) -> Iterator[tuple[int, bytes]]:
    with _opened(file) as f:
        for number, line in enumerate(f, 1):
            yield number, line.removeprefix(BOM) if number == 1 else line


def _decoded(file: str, number: int, line: bytes) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}:{number}: not UTF-8: {error}") from error


def _opened(file: str) -> Any:
    compression = COMPRESSED.get(Path(file).suffix.lower())
    if compression is None:
        return open(file, "rb")
    return LocalFileSystem().open(file, "rb", compression=compression)


READERS: dict[str, Callable[[str, Sequence[str], Any], Iterator[dict[str, Any]]]] = {
    "text": _lines,
    "json": _json,
    "csv": _csv,
}
