"""Which files `data.path` names, and the reader of `datasets` that each of them needs."""

from __future__ import annotations

import glob
import os
import re
from pathlib import Path

from rlpretrain.config import ConfigError, DataConfig
from rlpretrain.data.rows import COMPRESSED

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


def find_files(data: DataConfig) -> list[str]:
    """The files or URLs that `data.path` names, of one kind; empty for a hub id or a folder of `datasets`.

    Raises ConfigError for a missing file, a pattern without a match, and files of several or unknown kinds.
    """
    path = os.path.expanduser(data.path)
    if os.path.isfile(path) or "://" in path:
        files = [path]
    elif os.path.isdir(path):
        files = _find_in_folder(data, path)
        if not files:
            return []
    elif any(c in path for c in "*?["):
        files = sorted(file for file in glob.glob(path, recursive=True) if os.path.isfile(file))
        if not files:
            raise ConfigError(f"no file matches {data.path}")
    elif kind_of(path) or path.startswith((".", "/")) or path.count("/") > 1:
        raise ConfigError(f"no such file or folder: {data.path}")
    else:  # a hub id is `name` or `owner/name`
        return []
    kinds = {kind_of(file) for file in files}
    if None in kinds or len(kinds) > 1:
        endings = ", ".join(sorted({"".join(Path(file).suffixes) or Path(file).name for file in files}))
        raise ConfigError(
            f"{data.path} must name files of one kind, by their ending one of: {', '.join(KINDS)}; it "
            f"names {endings}: select the files you mean with a pattern such as folder/*.jsonl"
        )
    local = [file for file in files if "://" not in file]
    if local and not any(os.path.getsize(file) for file in local):
        raise ConfigError(f"{data.path} is empty: 0 bytes")
    return files


def kind_of(path: str) -> str | None:
    """The reader for a file name, looking through a compression suffix; None for an unknown ending."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes if suffix not in COMPRESSED]
    return KINDS.get(suffixes[-1]) if suffixes else None


def is_saved_dataset(folder: str) -> bool:
    """Whether `save_to_disk` of `datasets` wrote a folder."""
    return any(os.path.isfile(os.path.join(folder, mark)) for mark in ("state.json", "dataset_dict.json"))


def _find_in_folder(data: DataConfig, folder: str) -> list[str]:
    """The files of a folder and its subfolders, in order; empty where `datasets` has to read the folder.

    If every file is named for a split (train-2.jsonl, test/a.jsonl), those of the requested split; else all
    of them are the split train.
    """
    card = Path(folder, "README.md")
    has_dataset_card = card.is_file() and re.search(
        r"^configs:|^dataset_info:", card.read_text(errors="replace"), re.MULTILINE
    )
    if is_saved_dataset(folder) or data.name is not None or has_dataset_card:
        return []
    files = [
        path.relative_to(folder)
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file() and _is_data_file(path.relative_to(folder))
    ]
    if not files:
        raise ConfigError(f"{data.path} holds no documents: no file that ends in {', '.join(KINDS)}")
    splits = [_split_of(file) for file in files]
    if None in splits:
        splits = ["train"] * len(files)
    requested = data.split.split("[")[0]
    wanted = SPLITS.get(requested, requested)
    if wanted not in splits:
        existing = ", ".join(sorted(set(map(str, splits))))
        raise ConfigError(
            f'Unknown split "{requested}": {data.path} has {existing}, by the names of its files'
        )
    return [os.path.join(folder, file) for file, split in zip(files, splits, strict=True) if split == wanted]


def _is_data_file(file: Path) -> bool:
    """Whether a file of a folder holds documents: it is not hidden, no notice, and of a known kind."""
    hidden = any(part.startswith((".", "__")) for part in file.parts)
    notice = file.name == "dataset_infos.json" or file.stem.upper() in ("README", "LICENSE", "NOTICE")
    return not hidden and not notice and kind_of(file.name) is not None


def _split_of(file: Path) -> str | None:
    """The split that the name of a file, or of a folder above it, contains."""
    words = re.split(r"[-._ /\\0-9]+", str(file).lower())
    return next((SPLITS[word] for word in words if word in SPLITS), None)
