"""What the runs of `benchmarks.faults` share: a tiny model, a corpus, servers, and the pace of rollouts."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlpretrain.corpora import dial
from rlpretrain.objectives import rlp
from rollout.types import Group
from tests.builders import engines
from tests.builders.policies import SHARDED
from tests.builders.servers import Proxy, VLLMServer
from tests.builders.tiny import tiny_model

SHAPE = engines.SHAPE | {"tie_word_embeddings": False}
POLICIES: dict[str, dict[str, Any]] = {
    "torch": {"backend": "torch"},
    "FSDP 2": {"backend": "fsdp"},
    "ZeRO 2": {"backend": "deepspeed", "zero_stage": 2},
    "ZeRO 3": {"backend": "deepspeed", "deepspeed_config": SHARDED},
}
REQUEST = 5.0  # seconds for one answer of a server
DEADLINE = 240.0  # seconds without any engine after which a run would stop


@dataclass(kw_only=True)
class Config(rlp.Config):
    """RLP's fields, and the file that sets the pace."""

    pace: str = ""
    """A file with the seconds added to a rollout: otherwise a tiny model's run ends before a server is
    back.
    """


class Paced(rlp.RLP):
    """RLP with rollouts as slow as those of a larger model."""

    Config = Config

    async def rollout(self, engine: Any, positions: Any, seeds: Any) -> list[Group]:
        """The groups, after the pause."""
        await asyncio.sleep(float(Path(self.config.pace).read_text()))
        return await super().rollout(engine, positions, seeds)


SIZE = 1 << 27
"""Bytes of a disk that is filled."""


@dataclass
class Site:
    """What runs share: base checkpoint and corpus, two servers, and a proxy in front of each."""

    folder: Path
    disk: Disk
    servers: list[VLLMServer] = field(default_factory=list)
    proxies: list[Proxy] = field(default_factory=list)

    def pace(self, seconds: float) -> None:
        """Add this pause to every rollout from now on."""
        (self.folder / ".pace").write_text(str(seconds))
        (self.folder / ".pace").replace(self.folder / "pace")

    def values(
        self, output_dir: Path, engine: str, steps: int, ahead: int = 0, policy: str = "torch"
    ) -> dict[str, Any]:
        """The configuration of a run."""
        urls = [s.url for s in (self.proxies if engine == "proxies" else self.servers)]
        engines = {
            "hf": {"name": "hf"},
            "ray": {"name": "ray", "of": "hf", "num_engines": 2, "request_timeout": 60.0},
        }
        servers = {"name": "vllm_server", "urls": urls, "request_timeout": REQUEST, "block_size": 32}
        return {
            "model": str(self.folder / "base"),
            "data": {"path": str(self.folder / "corpus" / "train.jsonl"), "max_length": 64},
            "objective": {
                "name": "benchmarks.faults_site:Paced",
                "positions": "after",
                "marker": "shows",
                "pace": str(self.folder / "pace"),
            },
            "sampling": {"thoughts": 3, "max_thought_tokens": 4, "cut": "force_close"},
            "positions_per_step": 4,
            "optim": {"lr": 1e-3, "warmup_steps": 2},
            "policy": POLICIES[policy],
            "max_steps": steps,
            "threads": 1,
            "checkpoint": {"every": 5, "keep": 1000},
            "stop": {"collapse": False},
            "baseline": {"frozen_every": 0},
            "console": False,
            "device": "cpu",
            "save_rollouts": True,
            "output_dir": str(output_dir),
            "engine": engines.get(engine, servers)
            | ({} if engine == "hf" else {"deadline": DEADLINE})
            | {"max_staleness": ahead, "in_flight": 2},
        }


class Disk:
    """A small disk in memory, at a folder, that can be filled and made read-only. Only root can make one."""

    def __init__(self, folder: Path):
        self.folder, self.is_there = folder, False
        self.ballast = folder / "ballast"

    def make(self) -> Path:
        """The folder, with the disk at it."""
        if not self.is_there:
            self.folder.mkdir()
            self._mount("-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs")
            self.is_there = True
        return self.folder

    def fill(self, free: int) -> None:
        """Leave `free` bytes."""
        with self.ballast.open("wb") as file:
            while (more := shutil.disk_usage(self.folder).free - free) > 0:
                with contextlib.suppress(OSError):  # the run has just written more
                    os.posix_fallocate(file.fileno(), os.path.getsize(self.ballast), more)

    def empty(self) -> None:
        """Make room again."""
        self.ballast.unlink()

    def lock(self) -> bool:
        """Let nobody write; False while a file is open for writing."""
        try:
            self._mount("-o", "remount,ro")
        except subprocess.CalledProcessError:
            return False
        return True

    def unlock(self) -> None:
        """Let everybody write."""
        self._mount("-o", "remount,rw")

    def close(self) -> None:
        """Remove the disk."""
        if self.is_there:
            subprocess.run(["umount", "--lazy", str(self.folder)], check=True)

    def _mount(self, *options: str) -> None:
        subprocess.run(["mount", *options, str(self.folder)], check=True, stderr=subprocess.DEVNULL)


def write_inputs(folder: Path) -> None:
    """The corpus, and the base checkpoint of its vocabulary."""
    dial.write(folder / "corpus", base=10, train=1000, held_out=10)
    tiny_model("qwen3", len(dial.WORDS), **SHAPE).save_pretrained(folder / "base")
    dial.tokenizer().save_pretrained(folder / "base")


@contextlib.contextmanager
def site(folder: Path, with_servers: bool) -> Iterator[Site]:
    """Set up what runs share, and close it at the end."""
    write_inputs(folder)
    shared = Site(folder, Disk(folder / "disk"))
    try:
        if with_servers:
            shared.servers += [
                VLLMServer(folder / "base", folder / f"server-{i}.log").start() for i in range(2)
            ]
            shared.proxies += [Proxy(server.ready().port) for server in shared.servers]
        yield shared
    finally:
        shared.disk.close()
        for proxy in shared.proxies:
            proxy.close()
        for server in shared.servers:
            server.kill()
