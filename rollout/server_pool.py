"""The servers of one client: which of them work, and their weights.

Everything here runs on the client's event loop.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from rollout.handover import Handover
from rollout.servers import EngineUnavailable, Refused, Server
from rollout.waiting import EVERY

INSTALL = 'pip install "rlpretrain[server]"'
GRACE = 30.0
"""Seconds that the other servers have to start once the first one answers; later they are still taken in."""
SHORT = 10.0
"""Seconds to wait for an answer that costs a server nothing, at most."""


@dataclass(frozen=True, kw_only=True)
class PoolSettings:
    """The arguments of `ServerEngine` that the pool needs."""

    concurrency: int
    request_timeout: float
    deadline: float
    patience: float
    lead: bool
    vocabulary: int | None
    weights_dir: Path
    transfer: str = "file"
    frozen: bool = False
    in_flight: bool = False


class ServerPool:
    """Servers, with what is known of each.

    `mark` names the present weights on the servers: another write, run or trainer has another mark.
    `handover` has the present weights, also for servers that must load them later.
    """

    def __init__(
        self,
        servers: Sequence[Server],
        settings: PoolSettings,
        version: int,
        say: Callable[[str], None],
        handover: Handover,
    ) -> None:
        self.product = servers[0].product
        try:
            import httpx
        except ImportError as error:
            raise ImportError(f"an engine of {self.product} servers needs httpx: {INSTALL}") from error
        self.transport_error: type[Exception] = httpx.TransportError
        self._httpx = httpx
        self.settings, self.version, self.say = settings, version, say
        self.servers, self.handover = servers, handover
        self.counts: Counter[str] = Counter()
        self.max_model_len: int | None = None
        self.mark = ""
        self._short = min(SHORT, settings.request_timeout)
        self._synced = False
        self._closed = False
        self.answered = 0.0  # when a server answered last: deadlines count from there
        self._said = 0.0  # when `say` was called last
        self.open = asyncio.Event()  # closed while weights are loaded

    # start and end

    async def start(self, headers: Mapping[str, str]) -> None:
        """Wait for the servers, check them, and begin to watch them.

        Raises EngineUnavailable if none answers within the deadline, Refused if one cannot work.
        """
        settings = self.settings
        self._slots = {server.url: asyncio.Semaphore(settings.concurrency) for server in self.servers}
        self.open.set()
        limits = self._httpx.Limits(max_connections=settings.concurrency + 8)
        for server in self.servers:
            server.client = self._httpx.AsyncClient(
                base_url=server.url, headers=dict(headers), limits=limits, timeout=settings.request_timeout
            )
        answering = await self._first_to_answer()
        writes = settings.transfer != "nccl" and settings.lead and not settings.frozen
        folder = settings.weights_dir if writes else None
        for server in answering:
            await server.check(settings.vocabulary, folder)
        self.max_model_len = min(server.card["max_model_len"] for server in answering)
        for server in self.servers:
            server.alive = server in answering
        self._watchers = [asyncio.ensure_future(self._watch(server)) for server in self.servers]

    async def end(self) -> None:
        """Cancel everything that runs and close the connections."""
        self._closed = True
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        clients = [server.client.aclose() for server in self.servers if server.client]
        await asyncio.gather(*tasks, *clients, return_exceptions=True)

    async def _first_to_answer(self) -> list[Server]:
        """The first server that is healthy, and those that follow within the grace period."""
        end = time.monotonic() + self.settings.deadline
        waits = [asyncio.ensure_future(self._wait_for(server, end)) for server in self.servers]
        first, _ = await asyncio.wait(
            waits, timeout=self.settings.deadline, return_when=asyncio.FIRST_COMPLETED
        )
        if first:
            await asyncio.wait(waits, timeout=GRACE)
        answering = [server for server, task in zip(self.servers, waits, strict=True) if task.done()]
        for task in waits:
            task.result() if task.done() else task.cancel()
        if not answering:
            raise EngineUnavailable(
                f"no {self.product} server answered within {self.settings.deadline:.0f} s "
                f"({self.last_errors()})"
            )
        return answering

    async def _wait_for(self, server: Server, end: float) -> None:
        """Return once a server that is starting is healthy."""
        while True:
            try:
                if await server.healthy():
                    return
                server.last_error = "not healthy"
            except self.transport_error as error:
                server.last_error = repr(error)
            await self._pause(self.settings.patience, end)

    async def _pause(self, seconds: float, end: float) -> None:
        """Wait some seconds; every ten seconds of waiting, `say` why, and the time left until `end`."""
        now = time.monotonic()
        if now - self._said > EVERY and end - now < self.settings.deadline - 1:
            self._said = now
            self.say(
                f"waiting for {self.product} servers, {max(0.0, end - now):.0f} s more (engine.deadline): "
                f"{self.last_errors()}"
            )
        await asyncio.sleep(seconds)

    def last_errors(self) -> str:
        """The last error of each server."""
        return "; ".join(f"{server.url}: {server.last_error or 'no error'}" for server in self.servers)

    # who samples

    @asynccontextmanager
    async def slot(self, server: Server) -> AsyncIterator[None]:
        """One of the server's slots; waiting for it counts as load."""
        server.load += 1
        try:
            async with self._slots[server.url]:
                yield
        finally:
            server.load -= 1

    async def least_loaded(self, end: float) -> Server:
        """The working server with the least load; wait for one if there is none."""
        while not (working := [server for server in self.servers if server.alive]):
            if self._hopeless():
                raise Refused(f"no {self.product} server takes the present weights ({self.last_errors()})")
            last = max(end, self.answered + self.settings.deadline)
            if time.monotonic() > last:
                raise EngineUnavailable(
                    f"no {self.product} server works, for {self.settings.deadline:.0f} s "
                    f"({self.last_errors()})"
                )
            await self._pause(self.settings.patience / 4, last)
        return min(working, key=lambda server: server.load)

    # servers that fail and come back

    def _hopeless(self) -> bool:
        """Whether no server will ever take the present weights."""
        return all(server.stuck > 1 for server in self.servers)

    def leave_out(self, server: Server, reason: str) -> None:
        """Use a server no more until it is healthy again."""
        server.alive, server.last_error, server.group = False, reason, None
        server.failures += 1
        self.counts["server_failures"] += 1

    async def leave_out_restarted(self) -> list[Server]:
        """Leave out, and return, working servers that no longer have the weights they were given."""
        if not self._synced:
            return []
        working = [server for server in self.servers if server.alive]
        answers = await asyncio.gather(
            *(server.has_weights(self.mark, self._short) for server in working), return_exceptions=True
        )
        restarted = []
        for server, answer in zip(working, answers, strict=True):
            if answer is not True:
                default = "it was restarted, or another trainer gave it weights"
                self.leave_out(server, repr(answer) if answer else default)
                restarted.append(server)
        return restarted

    async def _watch(self, server: Server) -> None:
        """While a server is left out, ask for its health, with back-off, and take it back once it is well."""
        wait = self.settings.patience
        while not self._closed:  # an HTTP client may swallow a cancellation
            await asyncio.sleep(wait)
            if server.alive or not self.open.is_set():
                wait = self.settings.patience
                continue
            wait = min(8 * self.settings.patience, 2 * wait)
            try:
                await self._take_back(server)
            except Exception as error:  # whatever fails here, the other servers go on
                server.note_refusal(error)

    async def _take_back(self, server: Server) -> None:
        """Use a server again if it is healthy, with the present weights."""
        if not await server.healthy(self._short):
            return
        if not server.card:  # it did not answer at the start
            await server.check(self.settings.vocabulary)
        assert self.max_model_len is not None, "set when the pool started"
        if server.card["max_model_len"] < self.max_model_len:
            raise EngineUnavailable(
                f"it reads {server.card['max_model_len']} tokens, the others {self.max_model_len}"
            )
        mark = self.mark
        if self._synced and not await server.has_weights(mark, self._short):
            if not self.settings.lead:
                return  # rank 0 will give it the weights
            await self._load(server, mark, self.version)
        if mark == self.mark:  # else there are newer weights by now
            server.alive, server.stuck = True, 0
            self.counts["servers_taken_back"] += 1

    # weights

    async def sync(self, version: int) -> dict[str, float]:
        """Let every server load the present weights; the seconds of draining and loading, by metric.

        Raises EngineUnavailable if no server took them within the deadline.
        """
        begin = time.perf_counter()
        self.open.clear()
        try:
            while not self.settings.in_flight and any(server.in_flight for server in self.servers):
                await asyncio.sleep(0.002)
            drained = time.perf_counter()
            if self.settings.lead:
                self.mark = f"{self.settings.weights_dir.resolve()}@{version}-{uuid.uuid4().hex}"
                working = [server for server in self.servers if server.alive]
                loads = [self._load_or_leave_out(server, self.mark, version) for server in working]
                await asyncio.gather(*loads)
            self.version, self._synced = version, True
        finally:
            self.open.set()
        if self.settings.lead:
            await self._wait_for_one(version)
        loaded = time.perf_counter()
        return {"perf/weight_sync_drain_s": drained - begin, "perf/weight_sync_load_s": loaded - drained}

    async def _wait_for_one(self, version: int) -> None:
        """Return once a server works: the first that comes back is given the present weights."""
        end = time.monotonic() + self.settings.deadline
        while not any(server.alive for server in self.servers):
            if time.monotonic() > end or self._hopeless():
                raise EngineUnavailable(
                    f"no {self.product} server took the weights of version {version} ({self.last_errors()})"
                )
            await self._pause(self.settings.patience / 4, end)

    async def _load_or_leave_out(self, server: Server, mark: str, version: int) -> None:
        """Load weights; a server that fails is left out. Raises Refused at the first sync."""
        try:
            await self._load(server, mark, version)
        except Refused as error:
            self.leave_out(server, str(error))
            server.note_refusal(error)
            if not self._synced:
                raise
        except (self._httpx.HTTPError, EngineUnavailable, TimeoutError) as error:
            self.leave_out(server, repr(error))

    async def _load(self, server: Server, mark: str, version: int) -> None:
        """Let one server load the present weights."""
        server.loading = version
        await self.handover.give(server, mark, self._short)
        server.version = version
