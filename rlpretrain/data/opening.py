"""Opens the rows of `data.path`: with our own readers of local files, else with `datasets`."""

from __future__ import annotations

import glob
import itertools
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
from datasets import (
    Dataset,
    DatasetDict,
    Features,
    IterableDataset,
    ReadInstruction,
    Value,
    concatenate_datasets,
)
from datasets.exceptions import DatasetNotFoundError
from datasets.fingerprint import Hasher

from rlpretrain.config import ConfigError, DataConfig
from rlpretrain.data.data_files import find_files, is_saved_dataset, kind_of
from rlpretrain.data.rows import READERS, VERSION, columns_of, read_rows


def open_rows(data: DataConfig) -> Dataset | IterableDataset:
    """The rows of `data`: at least one, with the columns it names.

    `data.path` is a file, a glob of files of one kind, a folder (of files, or written by `save_to_disk`), a
    hub id or a URL. With `streaming: true` the rows are an IterableDataset. Local files count as the
    requested split, whatever its name.

    Raises ConfigError for a missing, empty or unknown file, a line that cannot be read (file and line), a
    missing split or column (the message lists the existing ones), and a hub dataset that does not exist or
    cannot be reached.
    """
    files = find_files(data)
    own = reads_cells(data)
    with readable(data):
        rows = _open_local(data, files) if own else _open_with_datasets(data, files)
        first: Any = {}
        if isinstance(rows, IterableDataset) or not len(rows):
            first = next(iter(rows), None)
        if first is None:
            raise ConfigError(f"{data.path} is empty: it holds no rows")
        names = columns_of(files, kind_of(files[0]) or "") if own else list(rows.column_names or first)
    for column in columns_wanted(data):
        if column not in names:
            raise ConfigError(f"{data.path} has no column '{column}'; its columns: {', '.join(names)}")
    return rows


def column_names(data: DataConfig) -> list[str]:
    """The columns of `data.path`, whatever columns `data` names. ConfigError as in `open_rows`."""
    files = find_files(data)
    with readable(data), quiet():
        if reads_cells(data):
            return columns_of(files, kind_of(files[0]) or "")
        rows = _open_with_datasets(replace(data, streaming=True), files)
        return list(rows.column_names or next(iter(rows), {}))


def first_rows(data: DataConfig, number: int) -> list[dict[str, Any]]:
    """The first rows of `data` with the columns that it names; the others are not read or downloaded."""
    with readable(data), quiet():
        rows = list(itertools.islice(open_rows(replace(data, streaming=True)), number))
    if not reads_cells(data):
        return [dict(row) for row in rows]
    return [{name: None if cell is None else json.loads(cell) for name, cell in row.items()} for row in rows]


def columns_wanted(data: DataConfig) -> list[str]:
    """The columns that `data` names, each once."""
    order = [order_column(data)] if data.order_by else []
    scores = [data.score_column] if data.score_column else []
    return list(dict.fromkeys([*_text_columns(data), *scores, *data.meta_columns, *order]))


def order_column(data: DataConfig) -> str:
    """The column that `data.order_by` names."""
    return str(data.order_by).removeprefix("-")


def reads_cells(data: DataConfig) -> bool:
    """Whether `rows.read_rows` reads `data`, so that cells are JSON: local files of text, JSON and CSV."""
    files = find_files(data)
    return bool(files) and kind_of(files[0]) in READERS and not any("://" in file for file in files)


def _text_columns(data: DataConfig) -> list[str]:
    return [data.column, *([data.answer_column] if data.answer_column else [])]


def _open_local(data: DataConfig, files: list[str]) -> Dataset | IterableDataset:
    columns = columns_wanted(data)
    split_name = data.split.split("[")[0]
    stats = [os.stat(file) for file in files]
    files_mark = [
        (os.path.abspath(file), stat.st_size, stat.st_mtime_ns)
        for file, stat in zip(files, stats, strict=True)
    ]
    arguments = {
        "files": files,
        "kind": kind_of(files[0]),
        "columns": tuple(columns),
        "texts": tuple(_text_columns(data)),
        "mark": (VERSION, *files_mark),
    }
    features = Features({column: Value("string") for column in columns})
    if data.streaming:
        if split_name != data.split:
            raise ConfigError(f"data.split {data.split}: a stream has no parts; set data.streaming to false")
        return IterableDataset.from_generator(read_rows, features=features, gen_kwargs=arguments)
    rows = Dataset.from_generator(
        read_rows, features=features, gen_kwargs=arguments, fingerprint=Hasher.hash(arguments)
    )
    assert isinstance(rows, Dataset)  # it is a dict of splits only where several are asked for
    if split_name == data.split:
        return rows
    parts = ReadInstruction.from_spec(data.split).to_absolute({split_name: len(rows)})
    return concatenate_datasets([rows.select(range(part.from_ or 0, part.to)) for part in parts])


def _open_with_datasets(data: DataConfig, files: list[str]) -> Dataset | IterableDataset:
    path, split = os.path.expanduser(data.path), data.split
    if files:
        kind = kind_of(files[0])
        assert kind is not None  # find_files refuses unknown endings
        options: dict[str, Any] = {"encoding": "utf-8-sig"} if kind == "text" else {}
        if kind == "csv":
            options = {"keep_default_na": False, "na_values": [""]}
            options |= {"sep": "\t"} if ".tsv" in Path(files[0]).suffixes else {}
        literal = [file if "://" in file else glob.escape(os.path.abspath(file)) for file in files]
        data_files = {split.split("[")[0]: literal}  # train[:10%] is a part of train
        return datasets.load_dataset(
            kind, data_files=data_files, split=split, streaming=data.streaming, **options
        )
    if not is_saved_dataset(path):
        return datasets.load_dataset(path, data.name, split=split, streaming=data.streaming)
    rows = datasets.load_from_disk(path)
    if isinstance(rows, DatasetDict):
        if split not in rows:
            raise ConfigError(f"{data.path} has no split '{split}'; its splits: {', '.join(map(str, rows))}")
        rows = rows[split]
    return rows.to_iterable_dataset() if data.streaming else rows


@contextmanager
def readable(data: DataConfig) -> Iterator[None]:
    """Around every read: an error of `datasets` becomes a ConfigError that names `data.path`."""
    try:
        yield
    except ConfigError:
        raise
    except DatasetNotFoundError as error:
        raise ConfigError(
            f"'{data.path}' is neither a local file or folder nor a dataset on the hub: {error}"
        ) from error
    except ConnectionError as error:
        raise ConfigError(
            f"'{data.path}' is not a local file or folder, and the hub cannot be reached (offline?): {error}"
        ) from error
    except Exception as error:
        if isinstance(error.__cause__, ConfigError):
            raise error.__cause__ from error
        raise ConfigError(f"cannot read {data.path}: {error.__cause__ or error}") from error


@contextmanager
def bar_if(is_long: bool) -> Iterator[None]:
    """Show the progress bars of `datasets`, within `quiet`, for work that takes long."""
    if is_long:
        datasets.enable_progress_bars()
    try:
        yield
    finally:
        if is_long:
            datasets.disable_progress_bars()


@contextmanager
def quiet() -> Iterator[None]:
    """Silences the progress bars and log lines of `datasets`; its settings are restored afterwards."""
    bars, level = not datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    if bars:
        datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if bars:
            datasets.enable_progress_bars()
