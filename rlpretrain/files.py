"""Writing files: checks before a run starts, errors that name the file, and JSON without NaN or infinity."""

from __future__ import annotations

import errno
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlpretrain.config.base import ConfigError

FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file is too large",
}
LOCKED = {errno.EACCES, errno.EPERM, errno.EROFS}
TORCH = ("PytorchStreamWriter", "file write failed", "iostream error", "unexpected pos", "open file failed")
"""Parts of torch.save's RuntimeErrors when a file cannot be written completely."""

NOTHING = 1 << 20
"""Bytes; with less free space, a write that failed without a reason failed because the disk is full."""


class CannotWrite(RuntimeError):
    """A file or folder cannot be written; the message says which, why, and what to do."""

    says_all = True  # the message is enough: print no traceback


def check_writable(path: str | Path, what: str) -> None:
    """Raise ConfigError unless the folder `path` exists, or can be made, and a file can be written to it.

    Files and folders made by the check are removed. `what` names the folder in the message.
    """
    folder = Path(path).absolute()
    missing_folders = [p for p in (folder, *folder.parents) if not p.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        trial = folder / ".rlpretrain-trial"
        trial.write_bytes(b"x" * 4096)
        trial.unlink()
        for made in missing_folders:
            made.rmdir()
    except OSError as error:
        raise ConfigError(f"{what} {path} cannot be written: {explain(error, folder)}") from None


def check_file(path: str | Path, what: str) -> None:
    """Raise ConfigError unless the file `path` can be written; an existing file is not changed."""
    path = Path(path)
    if path.is_dir():
        raise ConfigError(f"{what} {path} is a folder: name a file")
    check_writable(path.parent, f"{what} {path}: its folder")


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turn errors while `path` is written into CannotWrite."""
    try:
        yield
    except OSError as error:
        raise CannotWrite(f"cannot write {path}: {explain(error, Path(path))}") from None
    except Exception as error:
        message = str(error)
        from_safetensors = type(error).__name__ == "SafetensorError" and "I/O error" in message
        from_torch = isinstance(error, RuntimeError) and any(part in message for part in TORCH)
        if not from_safetensors and not from_torch:
            raise
        reason = message.strip().splitlines()[0]
        if (free := free_bytes(Path(path))) is not None and free < NOTHING:
            reason = f"{FULL[errno.ENOSPC]} ({reason})"
        raise CannotWrite(f"cannot write {path}: {reason}{_free_space(Path(path))}") from None


def explain(error: OSError, path: Path) -> str:
    """Return why a write failed; if the disk is full, with the free space."""
    reason = error.strerror or str(error)
    if error.errno in FULL:
        return f"{FULL[error.errno]} ({reason}){_free_space(path)}"
    if error.errno in LOCKED:
        return f"{reason}: choose a folder that you may write to, or change its permissions"
    return reason


def _free_space(path: Path) -> str:
    """Return the free space of the disk that holds `path`, as the end of a message."""
    free = free_bytes(path)
    return "" if free is None else f"; {free / 2**30:.2f} GiB are free there"


def free_bytes(path: Path) -> int | None:
    """Return the free space of the disk that holds `path`; None if there is no such disk."""
    folder = next((p for p in (path, *path.absolute().parents) if p.is_dir()), None)
    return shutil.disk_usage(folder).free if folder else None


def finite(record: Any) -> Any:
    """Return the record with None for every float that is NaN or infinite, at any depth; tuples become lists.

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
    """Return valid JSON of a record, with null for NaN and infinity."""
    return json.dumps(finite(record), allow_nan=False, **options)
