"""What `datasets` reads becomes rows, rows become token ids, what goes wrong a ConfigError with the place."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
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
from rlpretrain.data.rows import COMPRESSED, READERS, VERSION, columns_of, read_rows

KINDS = {
    ".txt": "text",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
"""File ending to reader of `datasets`."""
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "dev", "val"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""Words of file names that name a split."""


def open_rows(data: DataConfig) -> Dataset | IterableDataset:
    """The rows of `data`, with at least one row and with the columns it names.

    A file, a glob of files of one kind, a folder (of files, or written by `save_to_disk`), a hub id or a URL;
    an IterableDataset with `streaming: true`. Local files count as the split that is asked for, whatever its
    name.

    Raises ConfigError for a missing, empty or unknown file, a line that cannot be read (file and line), a
    missing split or column (those there are listed), and a hub dataset that does not exist or cannot be
    reached.
    """
    files, wanted = _files(data), columns_wanted(data)
    with readable(data):
        rows = _own_rows(data, files) if reads_cells(data) else _load(data, files)
        first = next(iter(rows), None) if isinstance(rows, IterableDataset) or not len(rows) else {}
        if first is None:
            raise ConfigError(f"{data.path} is empty: it holds no rows")
        names = (
            columns_of(files, _kind(files[0]) or "")
            if reads_cells(data)
            else list(rows.column_names or first)
        )
    for column in wanted:
        if column not in names:
            raise ConfigError(f"{data.path} has no column '{column}'; its columns: {', '.join(names)}")
    return rows


def columns_wanted(data: DataConfig) -> list[str]:
    """The columns that `data` names, each once."""
    answer = [data.answer_column] if data.answer_column else []
    return list(dict.fromkeys([data.column, *answer, *data.meta_columns]))


def reads_cells(data: DataConfig) -> bool:
    """Whether rows are read by `rows.read_rows`, so that their cells are JSON: local files of text, JSON
    and CSV.
    """
    files = _files(data)
    return bool(files) and _kind(files[0]) in READERS and not any("://" in file for file in files)


def _own_rows(data: DataConfig, files: list[str]) -> Dataset | IterableDataset:
    columns, name = columns_wanted(data), data.split.split("[")[0]
    texts = [data.column, *([data.answer_column] if data.answer_column else [])]
    state = [os.stat(file) for file in files]
    mark = (
        VERSION,
        *((os.path.abspath(f), s.st_size, s.st_mtime_ns) for f, s in zip(files, state, strict=True)),
    )
    given = {
        "files": files,
        "kind": _kind(files[0]),
        "columns": tuple(columns),
        "texts": tuple(texts),
        "mark": mark,
    }
    features = Features({column: Value("string") for column in columns})
    if data.streaming:
        if name != data.split:
            raise ConfigError(f"data.split {data.split}: a stream has no parts; set data.streaming to false")
        return IterableDataset.from_generator(read_rows, features=features, gen_kwargs=given)
    rows = Dataset.from_generator(
        read_rows, features=features, gen_kwargs=given, fingerprint=Hasher.hash(given)
    )
    if name == data.split:
        return rows
    parts = ReadInstruction.from_spec(data.split).to_absolute({name: len(rows)})
    return concatenate_datasets([rows.select(range(part.from_ or 0, part.to)) for part in parts])


def _load(data: DataConfig, files: list[str]) -> Dataset | IterableDataset:
    path, split = os.path.expanduser(data.path), data.split
    if files:
        options: dict[str, Any] = {"encoding": "utf-8-sig"} if _kind(files[0]) == "text" else {}
        if _kind(files[0]) == "csv":
            options = {"keep_default_na": False, "na_values": [""]}
            options |= {"sep": "\t"} if ".tsv" in Path(files[0]).suffixes else {}
        literal = [file if "://" in file else glob.escape(os.path.abspath(file)) for file in files]
        named = {split.split("[")[0]: literal}  # train[:10%] is a part of train
        return datasets.load_dataset(
            _kind(files[0]), data_files=named, split=split, streaming=data.streaming, **options
        )
    if not _saved(path):
        return datasets.load_dataset(path, data.name, split=split, streaming=data.streaming)
    rows = datasets.load_from_disk(path)
    if isinstance(rows, DatasetDict):
        if split not in rows:
            raise ConfigError(f"{data.path} has no split '{split}'; its splits: {', '.join(rows)}")
        rows = rows[split]
    return rows.to_iterable_dataset() if data.streaming else rows


def _saved(folder: str) -> bool:
    """Whether `save_to_disk` wrote a folder."""
    return any(os.path.isfile(os.path.join(folder, mark)) for mark in ("state.json", "dataset_dict.json"))


def _in_folder(data: DataConfig, folder: str) -> list[str]:
    """The files of a folder and of those in it, in order; none where `datasets` knows better how to read it.

    Where every file is named for a split (train-2.jsonl, test/a.jsonl), those of the split that is asked for;
    else all of them are the split train.
    """
    card = Path(folder, "README.md")
    described = card.is_file() and re.search(
        r"^configs:|^dataset_info:", card.read_text(errors="replace"), re.MULTILINE
    )
    if _saved(folder) or data.name is not None or described:
        return []
    files = []
    for path in sorted(Path(folder).rglob("*")):
        inside = path.relative_to(folder)
        hidden = any(part.startswith((".", "__")) for part in inside.parts)
        about = inside.name == "dataset_infos.json" or inside.stem.upper() in ("README", "LICENSE", "NOTICE")
        if path.is_file() and not hidden and not about and _kind(inside.name):
            files.append(inside)
    if not files:
        raise ConfigError(f"{data.path} holds no documents: no file that ends in {', '.join(KINDS)}")
    splits = [_split_of(file) for file in files]
    if None in splits:
        splits = ["train"] * len(files)
    asked = data.split.split("[")[0]
    wanted = SPLITS.get(asked, asked)
    if wanted not in splits:
        there = ", ".join(sorted(set(map(str, splits))))
        raise ConfigError(f'Unknown split "{asked}": {data.path} has {there}, by the names of its files')
    return [os.path.join(folder, file) for file, split in zip(files, splits, strict=True) if split == wanted]


def _split_of(file: Path) -> str | None:
    """The split for which a file, or a folder above it, is named."""
    words = re.split(r"[-._ /\\0-9]+", str(file).lower())
    return next((SPLITS[word] for word in words if word in SPLITS), None)


def _files(data: DataConfig) -> list[str]:
    """The files or URLs that `data.path` names, all of one known kind; none for a folder or a hub id."""
    path = os.path.expanduser(data.path)
    if os.path.isfile(path) or "://" in path:
        files = [path]
    elif os.path.isdir(path):
        files = _in_folder(data, path)
        if not files:
            return []
    elif any(c in path for c in "*?["):
        files = sorted(file for file in glob.glob(path, recursive=True) if os.path.isfile(file))
        if not files:
            raise ConfigError(f"no file matches {data.path}")
    elif (
        _kind(path) or path.startswith((".", "/")) or path.count("/") > 1
    ):  # a hub id is `name` or `owner/name`
        raise ConfigError(f"no such file or folder: {data.path}")
    else:
        return []
    kinds = {_kind(file) for file in files}
    if None in kinds or len(kinds) > 1:
        there = ", ".join(sorted({"".join(Path(file).suffixes) or Path(file).name for file in files}))
        raise ConfigError(
            f"{data.path} must name files of one kind, by their ending one of: {', '.join(KINDS)}; it "
            f"names {there}: give those that are meant by a pattern such as folder/*.jsonl"
        )
    local = [file for file in files if "://" not in file]
    if local and not any(os.path.getsize(file) for file in local):
        raise ConfigError(f"{data.path} is empty: 0 bytes")
    return files


def _kind(path: str) -> str | None:
    """The reader for a file name, looking through a compression suffix."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes if suffix not in COMPRESSED]
    return KINDS.get(suffixes[-1]) if suffixes else None


@contextmanager
def readable(data: DataConfig) -> Iterator[None]:
    """Around every read: what `datasets` raises is said as a ConfigError that names the place."""
    try:
        yield
    except ConfigError:
        raise
    except DatasetNotFoundError as error:
        raise ConfigError(
            f"'{data.path}' is no file or folder here, and no dataset of the hub: {error}"
        ) from error
    except ConnectionError as error:
        raise ConfigError(
            f"'{data.path}' is no file or folder here, and the hub cannot be reached (offline?) to look "
            f"there: {error}"
        ) from error
    except Exception as error:
        if isinstance(error.__cause__, ConfigError):
            raise error.__cause__ from error
        raise ConfigError(f"cannot read {data.path}: {error.__cause__ or error}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars and log lines of `datasets`, which are as they were afterwards."""
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
