"""Folders that are written, replaced and deleted: only what carries our mark is ever deleted, and files
follow the umask.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path

MARK = ".rlpretrain"
"""An empty file in every folder that we wrote and may delete again."""


def begin_folder(folder: Path) -> Path:
    """An empty folder beside `folder` to write into; `finish_folder` gives it its name."""
    work = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(work, ignore_errors=True)  # what a run left that was killed while it wrote
    work.mkdir(parents=True)
    (work / MARK).touch()
    return work


def finish_folder(work: Path, folder: Path) -> Path | None:
    """Let what `begin_folder` began be `folder`; where one that we did not write was moved to, if there
    was one.
    """
    follow_umask(work)
    moved = remove_folder(folder)
    work.replace(folder)
    return moved


def remove_folder(folder: Path) -> Path | None:
    """Delete a folder that carries our mark. Anything else of that name is moved aside; returns where to."""
    if not folder.exists() and not folder.is_symlink():
        return None
    if folder.is_dir() and not folder.is_symlink() and (folder / MARK).is_file():
        shutil.rmtree(folder)
        return None
    aside = free_name(folder.with_name(f"{folder.name}.before-{now()}"))
    folder.rename(aside)
    return aside


def remove_ours(parent: Path, pattern: str, keep: Path) -> None:
    """Delete the folders of a pattern that carry our mark, but not `keep`; what somebody else made stays."""
    for folder in parent.glob(pattern):
        if folder != keep and (folder / MARK).is_file():
            shutil.rmtree(folder, ignore_errors=True)


def now() -> str:
    """The time as a part of a name, in UTC."""
    return time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())


def free_name(path: Path) -> Path:
    """`path`, or the first of `path`-2, `path`-3, … that does not exist."""
    names = (path if n == 1 else path.with_name(f"{path.name}-{n}") for n in range(1, 1_000_000))
    return next(name for name in names if not name.exists() and not name.is_symlink())


def follow_umask(folder: Path) -> None:
    """Give the files of a folder the permissions of ordinary new files: those of safetensors are their
    owner's alone.
    """
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
