"""Warns of files that are both trained on and held out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from rlpretrain.config import DataConfig
from rlpretrain.data.data_files import find_files


def shared_files(training: Mapping[str, DataConfig], held_out: Mapping[str, DataConfig]) -> Iterator[str]:
    """A sentence for each held-out file with the same bytes as a file of the training data.

    The keys are the names of the sections in the configuration. Files are compared by a hash, so a copy under
    another name is found too. Data on the hub and of sources of a user's own is not looked at.
    """
    trained = [(name, file) for name, data in training.items() for file in _local_files(data)]
    for held_name, data in held_out.items():
        for file in _local_files(data):
            for name, other in trained:
                if _have_same_bytes(file, other):
                    yield (
                        f"{held_name} {file} is the training file {other} of {name}: its numbers are those "
                        "of training documents"
                    )


def _local_files(data: DataConfig) -> list[Path]:
    if data.source is not None:
        return []
    return [Path(file) for file in find_files(data) if "://" not in file]


def _have_same_bytes(a: Path, b: Path) -> bool:
    return a.stat().st_size == b.stat().st_size and (a.samefile(b) or _digest(a) == _digest(b))


def _digest(file: Path) -> bytes:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "blake2b").digest()
