"""Reads the rows of local .txt, .jsonl, .json, .csv and .tsv files without guessing types.

Readers that guess the type of a column take a text for a date, a number or a missing value. Here a JSON value
keeps its type, and a text column of a table is text. Each cell is passed on as JSON, so that a column may
hold values of any types.
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
"""Version of the cells: a new one invalidates what `datasets` has cached."""
COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
ROWS_FOR_COLUMNS = 1000
"""First rows of a file whose columns count as those of the file."""
BOM = b"\xef\xbb\xbf"


def read_rows(
    files: list[str], kind: str, columns: Sequence[str], texts: Sequence[str], mark: Any = None
) -> Iterator[Any]:
    """The rows of files of one kind, each a mapping from column to JSON; `texts` are the columns of text.

    Raises ConfigError, with file and line, for what cannot be read. `mark` is not used here: it makes the
    cache key of `datasets` depend on the size and time of the files.
    """
    for file in files:
        for row in READERS[kind](file, texts, columns):
            yield {name: json.dumps(row.get(name)) for name in columns}


def columns_of(files: Sequence[str], kind: str) -> list[str]:
    """The columns of the first file that has rows; empty if no file has."""
    for file in files:
        rows = list(islice(READERS[kind](file, (), None), ROWS_FOR_COLUMNS))
        if rows:
            return list(dict.fromkeys(name for row in rows for name in row))
    return []


def _lines(file: str, texts: Sequence[str], columns: Any) -> Iterator[dict[str, Any]]:
    for number, line in _raw_lines(file):
        for text in _decode(file, number, line.removesuffix(b"\n").removesuffix(b"\r")).split("\r"):
            yield {"text": text}


def _json(file: str, texts: Sequence[str], columns: Any) -> Iterator[dict[str, Any]]:
    lines = ((number, line) for number, line in _raw_lines(file) if line.strip())
    for count, (number, line) in enumerate(lines):
        text = _decode(file, number, line)
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            value = _parse_whole_file(file) if not count or text.lstrip()[:1] == "[" else None
            if value is None:
                shown = f"{text.strip()[:80]!r}"
                raise ConfigError(
                    f"{file}:{number}: not JSON: {error.msg} at column {error.colno}: {shown}"
                ) from error
            yield from _rows_of_value(file, value)
            return
        if isinstance(value, list) and not count:
            yield from _rows_of_value(file, value)
        elif isinstance(value, dict):
            yield value
        else:
            raise ConfigError(f"{file}:{number}: not a JSON object with columns but {text.strip()[:80]!r}")


def _parse_whole_file(file: str) -> Any:
    """One JSON value over all lines of a file; None if the file is not one value."""
    with _open(file) as f:
        data = f.read().removeprefix(BOM)
    try:
        return json.loads(data)
    except json.JSONDecodeError as error:
        if data.lstrip()[:1] == b"[":
            raise ConfigError(f"cannot read {file}: not JSON: {error}") from error
        return None


def _rows_of_value(file: str, value: Any) -> Iterator[dict[str, Any]]:
    """The rows of one JSON value: a list of rows or of texts, columns of one length, or one row."""
    if isinstance(value, dict):
        columns = list(value.values())
        is_table = columns and all(isinstance(c, list) for c in columns) and len(set(map(len, columns))) == 1
        if is_table:
            yield from (dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True))
        else:
            yield value
        return
    for row in value if isinstance(value, list) else [value]:
        if not isinstance(row, dict | str):
            raise ConfigError(f"{file}: not a JSON object with columns but {json.dumps(row)[:80]}")
        yield {"text": row} if isinstance(row, str) else row


def _csv(file: str, texts: Sequence[str], columns: Any) -> Iterator[dict[str, Any]]:
    """Cells of text columns are taken literally, NA and null too. In other columns an empty cell is None."""
    with _open(file) as f:
        beginning = f.read(1 << 16)
    if not beginning.removeprefix(BOM).strip():
        return
    separator = "\t" if ".tsv" in [s.lower() for s in Path(file).suffixes] else ","
    wanted = None if columns is None else columns.__contains__
    with _open(file) as f:
        header = list(pd.read_csv(f, sep=separator, encoding="utf-8-sig", nrows=0).columns)
    empty = {name: [""] for name in header if name not in texts}
    with _open(file) as f:
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
                yield {name: _to_python(value) for name, value in row.items()}


def _to_python(value: Any) -> Any:
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and value != value else value


def _raw_lines(file: str) -> Iterator[tuple[int, bytes]]:
    with _open(file) as f:
        for number, line in enumerate(f, 1):
            yield number, line.removeprefix(BOM) if number == 1 else line


def _decode(file: str, number: int, line: bytes) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}:{number}: not UTF-8: {error}") from error


def _open(file: str) -> Any:
    compression = COMPRESSED.get(Path(file).suffix.lower())
    if compression is None:
        return open(file, "rb")
    return LocalFileSystem().open(file, "rb", compression=compression)


READERS: dict[str, Callable[[str, Sequence[str], Any], Iterator[dict[str, Any]]]] = {
    "text": _lines,
    "json": _json,
    "csv": _csv,
}
