"""The faults of `benchmarks.faults`.

Each function injects one fault, waits until it is over, and returns whether the run was alive for it.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass

import psutil

from benchmarks.faults_site import DEADLINE, POLICIES, REQUEST, Site
from tests.builders.servers import VLLMServer
from tests.builders.trainers import Trainer


def kill_server(shared: Site, run: Trainer, rng: random.Random) -> bool:
    """SIGKILL a server and its engine process, and start it again.

    In three of ten cases it does not wait until both servers are back, so the other may follow.
    """
    while not (working := [s for s in shared.servers if answers(s)]):
        time.sleep(0.5)
    server, alone = rng.choice(working), rng.random() < 0.7
    server.kill()
    time.sleep(rng.uniform(0, 3))
    server.start()
    shared.pace(6.0)
    while alone and not all(map(answers, shared.servers)) and run.alive():  # half a minute at least
        time.sleep(0.5)
    shared.pace(0.5)
    return True


def answers(server: VLLMServer) -> bool:
    """Whether a server answers."""
    with contextlib.suppress(OSError), urllib.request.urlopen(f"{server.url}/health", timeout=2):
        return True
    return False


def hang_server(shared: Site, run: Trainer, rng: random.Random) -> bool:
    """SIGSTOP a server for longer than a request may take, until the run goes on; then wake it."""
    group, before, end = rng.choice(shared.servers).process.pid, run.step(), time.monotonic() + 1.5 * DEADLINE
    os.killpg(group, signal.SIGSTOP)
    time.sleep(REQUEST + rng.uniform(0.5, 2))
    while run.step() < before + 3 and run.alive() and time.monotonic() < end:
        time.sleep(0.05)
    os.killpg(group, signal.SIGCONT)
    return True


def slow_server(shared: Site, run: Trainer, rng: random.Random) -> bool:
    """Slow down answers, but stay within the time limit."""
    return _through_proxy(shared, run, rng, "slow", rng.uniform(0.5, 2))


def reset_connection(shared: Site, run: Trainer, rng: random.Random) -> bool:
    """Break connections in the middle of an answer."""
    return _through_proxy(shared, run, rng, "reset", rng.uniform(0, 0.3))


def _through_proxy(shared: Site, run: Trainer, rng: random.Random, mode: str, seconds: float) -> bool:
    proxy = rng.choice(shared.proxies)
    before, proxy.mode = proxy.hit, mode
    while proxy.hit == before and run.alive():  # until it affected an answer
        time.sleep(0.005)
    time.sleep(seconds)
    proxy.mode = "pass"
    return proxy.hit > before


def kill_actor(shared: Site, run: Trainer, rng: random.Random) -> bool:
    """SIGKILL a Ray actor, which may still be restarting after the last kill; Ray restarts it."""
    while run.alive():
        with contextlib.suppress(psutil.NoSuchProcess, IndexError):  # no actor exists, or it has just ended
            tree = psutil.Process(run.pid).children(recursive=True)
            rng.choice([p for p in tree if p.name().startswith("ray::Worker")]).kill()
            return True
    return False


def kill_trainer(shared: Site, run: Trainer, rng: random.Random) -> bool:
    """SIGKILL the trainer at any point, and resume it."""
    run.kill()
    time.sleep(rng.uniform(0, 0.5))
    run.start("--resume", "auto")
    return True


def kill_rank(shared: Site, run: Trainer, rng: random.Random) -> bool:
    """SIGKILL one of the ranks at any point, and resume them when the others have ended by themselves."""
    run.kill(rng.randrange(run.ranks))
    run.start("--resume", "auto")
    return True


def fill_disk(shared: Site, run: Trainer, rng: random.Random) -> bool:
    """Fill the disk up to less than a checkpoint, wait until the run has ended, make room, and resume it."""
    shared.disk.fill(rng.randrange(CHECKPOINT))
    return _ends_and_resumes(run, shared.disk.empty)


def lock_disk(shared: Site, run: Trainer, rng: random.Random) -> bool:
    """Make the disk read-only, wait until the run has ended, make it writable, and resume it."""
    while not shared.disk.lock():
        if not run.alive():
            return False
    return _ends_and_resumes(run, shared.disk.unlock)


def _ends_and_resumes(run: Trainer, restore: Callable[[], None]) -> bool:
    """Whether the run ended because of the fault; `named` counts those that said which file and why."""
    said = len(run.log.read_bytes())
    run.end()
    restore()
    if all(process.exitcode == 0 for process in run.processes):  # it had nothing more to write
        return False
    output = run.log.read_bytes()[said:]
    run.named += b"the disk is full" in output or b"Read-only file system" in output
    run.start("--resume", "auto")
    return True


CHECKPOINT = 300_000
"""Bytes, less than those of a checkpoint of the tiny model."""


@dataclass(frozen=True)
class Kind:
    """A kind of fault: how it is injected, the engine and length of its runs, and its timing."""

    inject: Callable[[Site, Trainer, random.Random], bool]
    engine: str
    pace: float
    steps: int  # of a run, for each injection
    between: tuple[int, int]  # steps between two injections
    policy: str = "torch"
    ranks: int = 1

    @property
    def on_disk(self) -> bool:
        """Whether its runs are on the small disk."""
        return self.inject in (fill_disk, lock_disk)

    @property
    def calm(self) -> str:
        """The name of the run without faults that its runs are compared with."""
        engine = "servers" if self.engine == "proxies" else self.engine
        return f"calm-{engine}-{self.policy}-{self.ranks}".replace(" ", "-")

    def wait(self, run: Trainer, rng: random.Random) -> None:
        """Wait some steps and a part of one; in a quarter of the cases a trainer is killed at its start."""
        before, more = run.step(), rng.randint(*self.between)
        if self.inject in (kill_trainer, kill_rank) and rng.random() < 0.25:
            more = 0
        while run.step() < before + more and run.alive():
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.4 + self.pace))


KINDS = {
    "server killed": Kind(kill_server, "servers", 0.5, 16, (1, 6)),
    "server hung": Kind(hang_server, "servers", 0.2, 15, (1, 5)),
    "server slow": Kind(slow_server, "proxies", 0.05, 10, (1, 4)),
    "connection reset": Kind(reset_connection, "proxies", 0.05, 10, (1, 6)),
    "actor killed": Kind(kill_actor, "ray", 0.3, 10, (1, 6)),
    "trainer killed, embedded engine": Kind(kill_trainer, "hf", 0.05, 10, (1, 6)),
    "trainer killed, servers": Kind(kill_trainer, "servers", 0.05, 10, (1, 6)),
    **{
        f"one of two ranks killed, {name}": Kind(kill_rank, "hf", 0.05, 10, (1, 6), name, ranks=2)
        for name in POLICIES
    },
    **{
        f"{fault}, {name}, {ranks} rank{'s' if ranks > 1 else ''}": Kind(
            inject, "hf", 0.05, 10, (1, 6), name, ranks
        )
        for fault, inject in (("disk full", fill_disk), ("disk read-only", lock_disk))
        for name, ranks in (("torch", 1), ("FSDP 2", 2), ("ZeRO 3", 2))
    },
}
