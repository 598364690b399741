"""Writing, replacing and deleting folders: only folders with our mark are deleted; files follow the umask."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

MARK = ".rlpretrain"
"""The name of an empty file in every folder that this library wrote and may delete."""


def begin_folder(folder: Path) -> Path:
    """Make an empty folder beside `folder` to write into; `finish_folder` renames it."""
    work = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(work, ignore_errors=True)  # a run that was killed may have left it
    work.mkdir(parents=True)
    (work / MARK).touch()
    return work


def finish_folder(work: Path, folder: Path) -> Path | None:
    """Rename the folder of `begin_folder`; returns the new path of a foreign `folder`, or None."""
    follow_umask(work)
    moved = remove_folder(folder)
    work.replace(folder)
    return moved


def remove_folder(folder: Path) -> Path | None:
    """Delete a folder with our mark; move anything else of that name aside and return its new path."""
    if not folder.exists() and not folder.is_symlink():
        return None
    if folder.is_dir() and not folder.is_symlink() and (folder / MARK).is_file():
        shutil.rmtree(folder)
        return None
    aside = free_name(folder.with_name(f"{folder.name}.before-{now()}"))
    folder.rename(aside)
    return aside


def remove_ours(parent: Path, pattern: str, keep: Path) -> None:
    """Delete the folders of a pattern that carry our mark, except `keep`."""
    for folder in parent.glob(pattern):
        if folder != keep and (folder / MARK).is_file():
            shutil.rmtree(folder, ignore_errors=True)


def now() -> str:
    """The present time in UTC, as part of a file name."""
    return time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())


def free_name(path: Path) -> Path:
    """`path`, or the first of `path`-2, `path`-3, … that does not exist."""
    names = (path if n == 1 else path.with_name(f"{path.name}-{n}") for n in range(1, 1_000_000))
    return next(name for name in names if not name.exists() and not name.is_symlink())


def follow_umask(folder: Path) -> None:
    """Give files the permissions of ordinary new files; safetensors writes them for their owner only."""
    usual = usual_mode(folder)
    for file in folder.rglob("*"):
        if file.is_file() and not file.is_symlink() and file.stat().st_mode & 0o777 != usual:
            file.chmod(usual)


def usual_mode(folder: Path) -> int:
    """The permissions that an ordinary new file gets in a folder."""
    example = folder / ".permissions"
    example.touch()
    try:
        return example.stat().st_mode & 0o777
    finally:
        example.unlink()
