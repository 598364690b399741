"""What is written to disk: tried before there is anything to lose, named when it fails; and JSON that any
reader takes.
"""

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
TORCH = ("PytorchStreamWriter", "file write failed", "iostream error", "unexpected pos")
"""What torch.save says, as a RuntimeError, where a file cannot be written to its end."""


class CannotWrite(RuntimeError):
    """A file or folder cannot be written; the message says which, why, and what to do."""

    says_all = True  # no traceback is needed


def check_writable(path: str | Path, what: str) -> None:
    """Raise ConfigError unless the folder `path` exists, or can be made, and takes a file; nothing is left of
    the trial. `what` says whose folder it is.
    """
    folder = Path(path).absolute()
    made = [p for p in (folder, *folder.parents) if not p.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        trial = folder / ".rlpretrain-trial"
        trial.write_bytes(b"x" * 4096)
        trial.unlink()
        for empty in made:
            empty.rmdir()
    except OSError as error:
        raise ConfigError(f"{what} {path} cannot be written: {explain(error, folder)}") from None


def check_file(path: str | Path, what: str) -> None:
    """Raise ConfigError unless the file `path` can be written; what is there stays as it is."""
    path = Path(path)
    if path.is_dir():
        raise ConfigError(f"{what} {path} is a folder: name a file")
    check_writable(path.parent, f"{what} {path}: its folder")


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turn what goes wrong while `path` is written into CannotWrite."""
    try:
        yield
    except OSError as error:
        raise CannotWrite(f"cannot write {path}: {explain(error, Path(path))}") from None
    except Exception as error:
        text = str(error)
        rust = type(error).__name__ == "SafetensorError" and "I/O error" in text
        torch = isinstance(error, RuntimeError) and any(sign in text for sign in TORCH)
        if not rust and not torch:
            raise
        line = text.strip().splitlines()[0]
        raise CannotWrite(f"cannot write {path}: {line}{_space(Path(path))}") from None


def explain(error: OSError, path: Path) -> str:
    """Why a write failed, in words, with the space that is left where that is the reason."""
    why = error.strerror or str(error)
    if error.errno in FULL:
        return f"{FULL[error.errno]} ({why}){_space(path)}"
    if error.errno in LOCKED:
        return f"{why}: choose a folder that you may write to, or change its permissions"
    return why


def _space(path: Path) -> str:
    """How much is free where `path` lies."""
    folder = next((p for p in (path, *path.absolute().parents) if p.is_dir()), None)
    return f"; {shutil.disk_usage(folder).free / 2**30:.2f} GiB are free there" if folder else ""


def finite(record: Any) -> Any:
    """The record with None in place of every float that is NaN or infinite, at any depth; tuples become
    lists.

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
