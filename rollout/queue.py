"""Rollouts ahead of the trainer, on their own thread, in the order they were submitted.

The trainer submits the rollouts of coming steps and takes those of the present one. How far ahead it submits
is the staleness bound; with 0 the same code runs synchronously. While weights change the queue is paused:
running rollouts are finished and waiting ones start under the new weights, so a group is sampled under one
version.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as Late
from dataclasses import dataclass

import torch

from rollout.types import Group

Rollout = Callable[[], Awaitable[list[Group]]]
"""Starts one piece of work: the groups of some positions."""


@dataclass
class Ticket:
    """Rollouts that were submitted together; `result` of the queue gives their groups."""

    pieces: list[Future[list[Group]]]


class RolloutQueue:
    """Runs submitted pieces, at most `in_flight` of them at a time.

    `deadline` in seconds bounds every wait, for a result or for a pause. None, the default, leaves that to
    the engine: one in this process may take long, one elsewhere has its own deadline. `result` raises what
    a piece raised. Waits raise TimeoutError, a closed queue RuntimeError.
    """

    def __init__(self, in_flight: int = 4, deadline: float | None = None):
        if in_flight < 1:
            raise ValueError(f"in_flight must be at least 1, got {in_flight}")
        self.in_flight, self.deadline = in_flight, deadline
        self._threads = torch.get_num_threads()
        self._loop = asyncio.new_event_loop()
        self._active = 0
        self._closed = False
        ready = threading.Event()
        self._thread = threading.Thread(target=self._serve, args=(ready,), name="rollout-queue", daemon=True)
        self._thread.start()
        ready.wait()

    def submit(self, pieces: Sequence[Rollout]) -> Ticket:
        """Queue some work; it starts when fewer than `in_flight` pieces run."""
        if self._closed:
            raise RuntimeError("this queue is closed")
        return Ticket([asyncio.run_coroutine_threadsafe(self._piece(piece), self._loop) for piece in pieces])

    def result(self, ticket: Ticket) -> list[Group]:
        """The groups of a ticket, in the order of its pieces."""
        end = None if self.deadline is None else time.monotonic() + self.deadline
        groups: list[Group] = []
        for i, piece in enumerate(ticket.pieces):
            try:
                groups += piece.result(None if end is None else max(0.0, end - time.monotonic()))
            except Late:
                if piece.done():
                    raise  # a TimeoutError of the piece itself
                for late in ticket.pieces[i:]:
                    late.cancel()
                missing = f"{len(ticket.pieces) - i} of {len(ticket.pieces)} pieces missing"
                raise TimeoutError(
                    f"rollouts took more than {self.deadline:.0f} s ({missing}): the engine hangs, or "
                    "engine.deadline is too short for so many thoughts"
                ) from None
        return groups

    def pause(self) -> None:
        """Start nothing more, and wait until nothing runs."""

        async def drain() -> None:
            self._gate.clear()
            while self._active:
                await asyncio.sleep(0.001)

        if self._closed:
            raise RuntimeError("this queue is closed")
        waiting = asyncio.run_coroutine_threadsafe(drain(), self._loop)
        try:
            waiting.result(self.deadline)
        except Late:
            waiting.cancel()
            raise TimeoutError(
                f"{self._active} rollouts still ran {self.deadline:.0f} s after the queue was paused"
            ) from None

    def resume(self) -> None:
        """Start the pieces that wait."""
        self._loop.call_soon_threadsafe(self._gate.set)

    def close(self, deadline: float = 30.0) -> None:
        """Cancel all pieces and wait at most `deadline` seconds for their end; a second call does nothing."""
        if self._closed:
            return
        self._closed = True

        async def end() -> None:
            tasks = [t for t in asyncio.all_tasks() if t is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks, timeout=deadline) if tasks else None
            self._loop.stop()

        asyncio.run_coroutine_threadsafe(end(), self._loop)
        self._thread.join(deadline)

    def _serve(self, ready: threading.Event) -> None:
        torch.set_num_threads(self._threads)  # torch keeps this number for each thread
        asyncio.set_event_loop(self._loop)
        self._gate, self._room = asyncio.Event(), asyncio.Semaphore(self.in_flight)
        self._gate.set()
        self._loop.call_soon(ready.set)
        self._loop.run_forever()

    async def _piece(self, work: Rollout) -> list[Group]:
        async with self._room:
            while not self._gate.is_set():  # it may close again between waking and running
                await self._gate.wait()
            self._active += 1
            try:
                return await work()
            finally:
                self._active -= 1
