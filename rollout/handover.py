"""How a client's weights reach its servers: whole in files, as changes in files, or over NCCL."""

from __future__ import annotations

import asyncio
import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from rollout.changes import BASE, FOLLOWED, changes_between, once
from rollout.folders import remove_ours
from rollout.servers import Server
from rollout.weights import Parameter, write_weights


class Handover(ABC):
    """The present weights of one client. `sent` counts the bytes of the last `put`."""

    sent = 0

    @abstractmethod
    def put(self, state: Mapping[str, Tensor], version: int, base: str) -> None:
        """Take the whole weights of a version; `base` is the mark of those before them, or empty."""

    @abstractmethod
    async def give(self, server: Server, mark: str, timeout: float) -> None:
        """Let a server load the present weights; `timeout` is for answers that cost it nothing."""

    def close(self) -> None:  # noqa: B027  nothing to do where nothing was written
        """Delete what was written."""


class Files(Handover):
    """Whole weights, as safetensors in a folder that trainer and servers share."""

    def __init__(self, weights_dir: Path):
        self.weights_dir = weights_dir
        self.folder: Path | None = None

    def put(self, state: Mapping[str, Tensor], version: int, base: str) -> None:
        """Write them, and delete the weights before them, those of a killed run too."""
        self.folder = self.weights_dir / f"version-{version}"
        write_weights(self.folder, state)
        self.sent = _size(state)
        remove_ours(self.weights_dir, "version-*", keep=self.folder)

    async def give(self, server: Server, mark: str, timeout: float) -> None:
        """By the path of the folder."""
        assert self.folder is not None, "written before every sync"
        await server.load_weights(self.folder.resolve(), mark)

    def close(self) -> None:
        """Delete the folder."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


class Changes(Handover):
    """What changed since the last sync, in the same folder; whole weights for a server without those.

    The trainer keeps the present weights in memory, and so does each server (`rlpretrain serve`).
    """

    def __init__(self, weights_dir: Path, parameters: Sequence[Parameter]):
        self.weights_dir, self.parameters = weights_dir, parameters
        self.present: Present | None = None

    def put(self, state: Mapping[str, Tensor], version: int, base: str) -> None:
        """Write the changes, or the whole weights if there are none before them or these are not larger."""
        before = self.present.state if self.present is not None and base else None
        present = Present(once(state, self.parameters), base, self.weights_dir / f"version-{version}")
        changes = present.state if before is None else changes_between(before, present.state)
        self.sent = _size(changes)
        if self.sent < _size(present.state):
            written = present.changes = self.weights_dir / f"version-{version}-changes"
            write_weights(written, changes, {BASE: base})
        else:
            written = present.write_whole()
        self.present = present
        remove_ours(self.weights_dir, "version-*", keep=written)

    async def give(self, server: Server, mark: str, timeout: float) -> None:
        """The changes to a server that has what changed; to any other the whole weights, written once."""
        present = self.present  # the next weights may come meanwhile
        assert present is not None, "put before every sync"
        if present.changes is not None and await server.has_weights(present.base, timeout):
            folder = present.changes
        else:
            async with present.writing:
                folder = present.whole or await asyncio.to_thread(present.write_whole)
        await server.load_weights(folder.resolve(), mark)

    def close(self) -> None:
        """Delete what the last sync wrote."""
        for folder in (self.present.changes, self.present.whole) if self.present is not None else ():
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)


class Present:
    """The weights of one version, and the folders that have them: the changes of `base`, or all."""

    def __init__(self, state: dict[str, Tensor], base: str, folder: Path):
        self.state, self.base, self.folder = state, base, folder
        self.changes: Path | None = None
        self.whole: Path | None = None
        self.writing = asyncio.Lock()

    def write_whole(self) -> Path:
        """Write all weights, for a reader that keeps them."""
        write_weights(self.folder, self.state, {FOLLOWED: "true"})
        self.whole = self.folder
        return self.folder


class NCCL(Handover):
    """Whole weights from GPU to GPU; servers reach this process at `host`."""

    def __init__(self, host: str | None, timeout: float):
        self.host, self.timeout = host, timeout
        self.state: Mapping[str, Tensor] = {}

    def put(self, state: Mapping[str, Tensor], version: int, base: str) -> None:
        """Keep them in memory."""
        self.state, self.sent = state, _size(state)

    async def give(self, server: Server, mark: str, timeout: float) -> None:
        """By a broadcast, which may take as long as a request."""
        await server.receive_weights(self.state, mark, self.host, self.timeout)


def _size(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of the tensors, those that share memory once."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors.values()}.values())
