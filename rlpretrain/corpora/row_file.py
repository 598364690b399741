"""A file of rows that is written batch by batch, and continued after an interruption.

Rows are appended to a file in a hidden folder beside OUT, which becomes OUT when the last row is in it. So
OUT is always whole, and no reader of its folder takes half of it for data. A row that was written in part is
removed before the next one is appended.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from rlpretrain import __version__
from rlpretrain.config import ConfigError
from rlpretrain.files import check_file, dumps, writing
from rlpretrain.training.records import write_json
from rlpretrain.training.same_settings import changes
from rollout.folders import MARK


class RowFile:
    """The rows of OUT, one for each row of the data, in their order.

    `settings` are what the rows depend on. Raises ConfigError if OUT is a folder, cannot be written, or is
    another file; if rows were begun with other settings; and while another process writes them.
    """

    def __init__(self, out: Path, settings: Mapping[str, Any], total: int):
        self.out, self.total = out, total
        self.settings = json.loads(dumps(settings))
        self.folder = folder_of(out)
        self.part, self.record = self.folder / "rows.jsonl", self.folder / "augment.json"
        self._lock: BinaryIO | None = None
        check_out(out)
        if self.record.is_file():
            self._check_same()
        elif out.exists() or (self.folder.exists() and [f.name for f in self.folder.iterdir()] != [MARK]):
            kind = out if out.exists() else self.folder
            raise ConfigError(f"--out: {kind} exists, and is not of this command: choose another name")
        else:
            self.folder.mkdir(parents=True, exist_ok=True)  # of a call that was stopped at once
            (self.folder / MARK).touch()
            self._write_record({})
        self._claim()
        self.done = total if self.is_complete else self._repair()

    @property
    def is_complete(self) -> bool:
        """Whether all rows are in OUT."""
        return self.out.exists() and not self.part.exists()

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append rows, so that they are on the disk when it returns."""
        data = "".join(f"{dumps(row)}\n" for row in rows)
        with writing(self.part), self.part.open("ab") as file:
            file.write(data.encode())
            file.flush()
            os.fsync(file.fileno())
        self.done += len(rows)

    def rows(self) -> Iterator[dict[str, Any]]:
        """All rows that are written."""
        file = self.out if self.is_complete else self.part
        if file.exists():
            with file.open(encoding="utf-8") as lines:
                yield from map(json.loads, lines)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Give the rows their name, and keep `summary` beside them."""
        assert self.done == self.total, "every row of the data has a row"
        self._write_record(summary)
        if self.out.exists():
            raise ConfigError(f"--out {self.out} appeared meanwhile; the rows are kept in {self.part}")
        with writing(self.out):
            self.part.replace(self.out)
        for name in ("start", "weights"):  # an engine's
            shutil.rmtree(self.folder / name, ignore_errors=True)

    def close(self) -> None:
        """Let another process continue."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _check_same(self) -> None:
        """Raise ConfigError if the rows that are there were made with other settings."""
        try:
            before = json.loads(self.record.read_text(encoding="utf-8"))["settings"]
        except (ValueError, KeyError, OSError, TypeError):
            raise ConfigError(
                f"{self.record} is damaged: remove {self.folder}, and the rows are made again"
            ) from None
        if different := changes(before, self.settings):
            raise ConfigError(
                f"--out {self.out} was begun with other settings: {'; '.join(different)}. Restore them, "
                f"choose another --out, or remove {self.folder}"
                + (f" and {self.out}" if self.out.exists() else "")
            )
        if self.out.exists() and self.part.exists():
            raise ConfigError(
                f"--out {self.out} exists, beside unfinished rows in {self.folder}: move one of them away"
            )

    def _claim(self) -> None:
        """Keep other processes away until `close`; nothing where the file system has no locks."""
        self._lock = (self.folder / "lock").open("wb")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise ConfigError(f"--out {self.out}: another process writes its rows now") from None
        except OSError:
            pass

    def _repair(self) -> int:
        """Remove a row that was written in part; the number of whole rows."""
        if not self.part.exists():
            self.part.touch()
        whole, count, last = 0, 0, b""
        with self.part.open("rb+") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                whole, count = whole + len(line), count + 1
                last = line
            file.truncate(whole)
        if count and (count > self.total or _row_of(last) != count - 1):
            raise ConfigError(
                f"{self.part} is damaged: its line {count} is not row {count - 1} of the data. Remove "
                f"{self.folder}, and the rows are made again"
            )
        return count

    def _write_record(self, summary: Mapping[str, Any]) -> None:
        record = {"settings": self.settings, "rlpretrain": __version__, "summary": dict(summary)}
        write_json(self.record, record)


def folder_of(out: Path) -> Path:
    """The hidden folder beside OUT."""
    return out.parent / f".{out.name}.augment"


def check_out(out: Path) -> None:
    """Raise ConfigError unless OUT is a name for a JSONL file that can be written."""
    check_file(out, "--out")
    if out.suffix != ".jsonl":
        raise ConfigError(f"--out {out}: rows are written as JSON lines: end the name with .jsonl")


def _row_of(line: bytes) -> Any:
    """The number of the row in a line; None if the line is not a row."""
    try:
        return json.loads(line)["row"]
    except (ValueError, KeyError, TypeError):
        return None
