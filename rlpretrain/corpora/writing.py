"""Writing the files of a corpus into a folder that is marked as ours."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rlpretrain.config import ConfigError
from rlpretrain.files import check_writable, writing
from rollout.folders import MARK


def save_rows(
    folder: Path, files: Mapping[str, Iterator[dict[str, Any]]], others: tuple[str, ...] = ()
) -> dict[str, Path]:
    """Write each of `files` as NAME.jsonl, in their order; the paths by name.

    `others` are names of further files that the caller will write. ConfigError if one of the names exists in
    a folder that is not ours.
    """
    names = [*others, *(f"{name}.jsonl" for name in files)]
    existing = next((folder / name for name in names if (folder / name).exists()), None)
    if existing and not (folder / MARK).is_file():
        raise ConfigError(
            f"{existing} exists, and is not part of a corpus that rlpretrain made: choose another folder"
        )
    check_writable(folder, "the corpus folder")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).touch()
    paths = {}
    for name, rows in files.items():
        paths[name] = folder / f"{name}.jsonl"
        temporary = folder / f".{name}.jsonl.tmp"
        with writing(paths[name]), temporary.open("w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        temporary.replace(paths[name])
    return paths
