"""Client of one or several vLLM servers, over vLLM's own routes: a stock server is enough.

Start each with

    VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs --generation-config vllm \
        --dtype float32 --max-num-seqs 256

(with the CPU build as docs/rollout.md has it). The dev mode opens the routes that weights need; keep such a
server on a private network. Weights travel as safetensors through `weights_dir`, a folder that trainer and
servers share.
"""

from __future__ import annotations

import asyncio
import logging
import math
import shutil
import threading
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from rollout.engine import check_request
from rollout.folders import remove_ours
from rollout.types import FinishReason, Prompt, SamplingParams, Thought, WeightSource
from rollout.vllm_routes import EngineUnavailable, Refused, Server, body_of, completion, thoughts
from rollout.weights import complete, parameters_of, write_weights

log = logging.getLogger(__name__)
INSTALL = 'pip install "rlpretrain[server]"'
EVERY = 10.0
"""Seconds between two lines that say who is waited for."""
GRACE = 30.0
"""Seconds that servers still starting have, at the beginning, once one of them answers; they are taken in
later too.
"""


class VLLMServerEngine:
    """Samples from vLLM servers: least loaded first, at most `concurrency` prompts in flight each.

    `model` is the folder or hub id of the checkpoint that the servers run (its configuration tells which
    weights there are), `weights_dir` the folder that weights pass through, as trainer and servers see it, and
    no other trainer's. A request that fails is tried elsewhere with back-off; a server that fails is left
    out, asked for its health after `patience` seconds, twice and up to eight times as many, and taken back
    with the present weights. `request_timeout` is for one answer; after `deadline` seconds without any server
    that works, `sample` and `sync` raise EngineUnavailable. `transfer` nccl sends weights from GPU to GPU
    instead (see `vllm_nccl`; the servers reach this process at `master_address`). `lead` is false on the
    ranks that leave weights to rank 0; `share` gives all ranks rank 0's value, and lets the others wait for
    it. `vocabulary` is the number of tokens of the model that is trained. `say` hears now and then who is
    waited for, and for how long still. What all servers refuse for good (a table of another size, a folder
    they may not read) raises at once. All calls run on one event loop in a thread of its own, so any thread
    and any loop may `sample`.
    """

    shares_weights = False

    def __init__(
        self,
        urls: Sequence[str],
        *,
        model: str | Path,
        weights_dir: str | Path,
        revision: str | None = None,
        trust_remote_code: bool = False,
        token: str | None = None,
        concurrency: int = 64,
        request_timeout: float = 120.0,
        deadline: float = 300.0,
        patience: float = 1.0,
        version: int = 0,
        block_size: int | None = None,
        transfer: str = "file",
        master_address: str | None = None,
        lead: bool = True,
        vocabulary: int | None = None,
        say: Callable[[str], None] = log.warning,
        share: Callable[[Any], Any] = lambda value: value,
    ) -> None:
        try:
            import httpx
        except ImportError as error:
            raise ImportError(f"engine vllm_server needs httpx: {INSTALL}") from error
        if not urls:
            raise ValueError("engine vllm_server needs the URL of at least one server")
        if transfer == "nccl" and not torch.cuda.is_available():
            raise ValueError(
                "engine.transfer: nccl needs CUDA in the trainer; engine.transfer: file needs none"
            )
        self._httpx, self.version = httpx, version
        self.weights_dir, self.concurrency, self.deadline, self.patience = (
            Path(weights_dir),
            concurrency,
            deadline,
            patience,
        )
        self.request_timeout, self.lead, self.share = request_timeout, lead, share
        self._short = min(10.0, request_timeout)  # for questions that cost a server nothing
        self.vocabulary, self.say, self._said = vocabulary, say, 0.0
        self.block_size = block_size or 128  # the largest that servers choose by themselves
        self.timings: dict[str, float] = {}
        self.counts: Counter[str] = Counter()
        self._parameters = parameters_of(model, revision=revision, trust_remote_code=trust_remote_code)
        self._folder: Path | None = None
        self._mark = ""  # names the present weights: another write, run or trainer has another mark
        self._state: dict[str, Any] = {}  # the present weights, for transfers that need them again
        self.transfer, self.master_address = transfer, master_address
        self._synced, self._answered = False, 0.0  # when a server answered last: a deadline counts from there
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self.servers = [Server(url.rstrip("/")) for url in urls]
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rollout-client", daemon=True)
        self._thread.start()
        self._closed = False
        try:
            self._run(self._start(headers), deadline + GRACE + 4 * request_timeout)
        except BaseException:
            self.close()
            raise

    async def sample(
        self, prompts: Sequence[Prompt], params: SamplingParams, n: int, seeds: Sequence[int]
    ) -> list[list[Thought]]:
        """Draw `n` thoughts for each prompt, a request a prompt; see `Engine.sample`.

        Thought k of prompt i is drawn with the seed `seeds[i] + k`, so it does not matter which server
        answers. A prompt that servers keep failing on gives thoughts that end in ABORT, which are never
        trained. Raises ValueError for what a server refuses, EngineUnavailable when none works.
        """
        if self._closed:
            raise RuntimeError("this engine is closed")
        check_request(prompts, params, n, seeds, vocabulary=math.inf, most=self.max_model_len, strings=True)
        work = asyncio.run_coroutine_threadsafe(
            self._sample(list(prompts), params, n, list(seeds)), self._loop
        )
        return await asyncio.wrap_future(work)

    def sync(self, weights: WeightSource, version: int) -> None:
        """Write the weights to `weights_dir` and let every server load them, with requests drained and caches
        emptied.

        On several ranks all call it; the first one writes and tells the servers. A server that does not
        manage is left out until it does. Raises ValueError if parameters are missing, EngineUnavailable if no
        server took the weights.
        """
        if self._closed:
            raise RuntimeError("this engine is closed")
        begin = time.perf_counter()
        state = {
            name: tensor.detach().to("cpu", copy=True).contiguous() if self.lead else None
            for name, tensor in weights()
        }
        self.timings["perf/weight_sync_gather_s"] = time.perf_counter() - begin
        if self.lead:
            begin = time.perf_counter()
            self._folder = self.weights_dir / f"version-{version}"
            whole = complete(state, self._parameters)  # type: ignore[arg-type]
            if self.transfer == "nccl":
                self._state = whole
            else:
                write_weights(self._folder, whole)
            remove_ours(
                self.weights_dir, "version-*", keep=self._folder
            )  # those of a run that was killed too
            self.timings["perf/weight_sync_write_s"] = time.perf_counter() - begin
        self._run(self._sync(version), self.deadline + 4 * self.request_timeout)
        self._mark = self.share(self._mark)

    @property
    def num_engines(self) -> int:
        """Servers that work."""
        return max(1, sum(s.alive for s in self.servers))

    def reset_prefix_cache(self) -> None:
        """Let every server forget the contexts it read."""
        for server in self.servers:
            if server.alive:
                self._run(server.ask("/reset_prefix_cache"), self.request_timeout)

    def health(self) -> dict[str, Any]:
        """Kind, version, what is known of each server, counters since the start."""
        known = [
            {k: v for k, v in vars(server).items() if k not in ("client", "group")} for server in self.servers
        ]
        return {
            "kind": "vllm_server",
            "version": self.version,
            "shares_weights": False,
            "closed": self._closed,
            "max_model_len": getattr(self, "max_model_len", None),
            "servers": known,
            **self.counts,
        }

    def close(self) -> None:
        """Let go of the connections; the servers go on. Calling it twice is harmless."""
        if self._closed:
            return
        self._closed = True

        async def end() -> None:
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            clients = [s.client.aclose() for s in self.servers if s.client]
            await asyncio.gather(*tasks, *clients, return_exceptions=True)

        with suppress(EngineUnavailable):  # what does not end now ends with the process
            self._run(end(), 10.0)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10.0)
        if self.lead and self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _run(self, work: Coroutine[Any, Any, Any], timeout: float) -> Any:
        """Run on the client's loop and wait; nothing waits for ever."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(timeout)
        except TimeoutError:
            future.cancel()
            why = f"no answer within {timeout:.0f} s from the vLLM servers ({self._last_words()})"
            raise EngineUnavailable(why) from None

    def _last_words(self) -> str:
        return "; ".join(f"{s.url}: {s.last_error or 'no error'}" for s in self.servers)

    async def _start(self, headers: dict[str, str]) -> None:
        self._slots = {s.url: asyncio.Semaphore(self.concurrency) for s in self.servers}
        self._open = asyncio.Event()
        self._open.set()
        limits = self._httpx.Limits(max_connections=self.concurrency + 8)
        for server in self.servers:
            server.client = self._httpx.AsyncClient(
                base_url=server.url, headers=headers, limits=limits, timeout=self.request_timeout
            )
        end = time.monotonic() + self.deadline
        begun = [asyncio.ensure_future(self._wait_for(server, end)) for server in self.servers]
        first, _ = await asyncio.wait(begun, timeout=self.deadline, return_when=asyncio.FIRST_COMPLETED)
        if first:
            await asyncio.wait(begun, timeout=GRACE)
        there = [s for s, task in zip(self.servers, begun, strict=True) if task.done()]
        for task in begun:
            task.result() if task.done() else task.cancel()
        if not there:
            raise EngineUnavailable(
                f"no vLLM server answered within {self.deadline:.0f} s ({self._last_words()})"
            )
        for server in there:
            await server.check(
                self.vocabulary, self.weights_dir if self.transfer == "file" and self.lead else None
            )
        self.model = there[0].card["id"]
        self.max_model_len: int = min(s.card["max_model_len"] for s in there)
        for server in self.servers:
            server.alive = server in there
        self._nurses = [asyncio.ensure_future(self._take_back(server)) for server in self.servers]

    async def _wait_for(self, server: Server, end: float) -> None:
        """Until a server that is starting answers."""
        while True:
            try:
                if await server.healthy():
                    return
                server.last_error = "not healthy"
            except self._httpx.TransportError as error:
                server.last_error = repr(error)
            await self._pause(self.patience, end)

    async def _pause(self, seconds: float, end: float) -> None:
        """Wait a moment, and now and then say for whom."""
        now = time.monotonic()
        if now - self._said > EVERY and end - now < self.deadline - 1:
            self._said = now
            self.say(
                f"waiting for vLLM servers, {max(0.0, end - now):.0f} s more (engine.deadline): "
                f"{self._last_words()}"
            )
        await asyncio.sleep(seconds)

    async def _sample(
        self, prompts: list[Prompt], params: SamplingParams, n: int, seeds: list[int]
    ) -> list[list[Thought]]:
        groups: list[list[Thought]] = [[] for _ in prompts]
        left = list(range(len(prompts)))
        while left:  # again for what came from a server that was restarted meanwhile, with other weights
            await self._confirm()
            end = time.monotonic() + self.deadline
            work = [asyncio.ensure_future(self._prompt(prompts[i], params, n, seeds[i], end)) for i in left]
            try:
                answers = dict(zip(left, await asyncio.gather(*work), strict=True))
            finally:
                for task in work:
                    task.cancel()
            lost = await self._confirm()
            for i, (group, _) in answers.items():
                groups[i] = group
            left = [i for i, (_, server) in answers.items() if server in lost]
            self.counts["resampled_prompts"] += len(left)
        self.counts.update(
            prompts=len(prompts),
            thoughts=n * len(prompts),
            tokens=sum(len(t.token_ids) for group in groups for t in group),
        )
        return groups

    async def _confirm(self) -> list[Server]:
        """Leave out, and return, the servers that work but no longer have the weights they were given:
        they were restarted.
        """
        if not self._synced:
            return []
        working = [s for s in self.servers if s.alive]
        answers = await asyncio.gather(
            *(s.has_weights(self._mark, self._short) for s in working), return_exceptions=True
        )
        lost = []
        for server, answer in zip(working, answers, strict=True):
            if answer is not True:
                self._failed(
                    server, repr(answer) if answer else "it was restarted, or another trainer gave it weights"
                )
                lost.append(server)
        return lost

    async def _prompt(
        self, prompt: Prompt, params: SamplingParams, n: int, seed: int, end: float
    ) -> tuple[list[Thought], Server | None]:
        """One prompt's thoughts, from whichever server manages first, and that server."""
        request = completion(self.model, prompt, params, n, seed)
        refused = 0
        while True:
            await self._open.wait()  # closed while weights are loaded
            server = await self._least_loaded(end)
            async with self._room(server):
                if not server.alive or not self._open.is_set():
                    continue
                server.in_flight += 1
                version = self.version
                try:
                    answer = await server.client.post("/v1/completions", json=request)
                    if answer.status_code == 200:
                        self._answered = time.monotonic()
                        found = thoughts(body_of(answer), prompt, params, seed, version)
                        if found is not None:
                            return found, server
                        server.last_error = "it aborted a request"
                    elif answer.status_code == 429:
                        server.last_error = "429: too many requests"
                    elif answer.status_code < 500 and answer.status_code != 408:
                        raise ValueError(
                            f"{server.url} refused a prompt of {len(prompt.token_ids)} tokens: "
                            f"{answer.text[:300]}"
                        )
                    else:
                        refused += 1
                        self._failed(server, f"{answer.status_code} {answer.text[:300]}")
                except (self._httpx.TransportError, KeyError) as error:
                    self._failed(server, repr(error))
                finally:
                    server.in_flight -= 1
            self.counts["retries"] += 1
            if time.monotonic() > max(end, self._answered + self.deadline):
                raise EngineUnavailable(
                    f"a prompt had no answer within {self.deadline:.0f} s: {self._last_words()}"
                )
            await asyncio.sleep(self.patience / 10)
            if refused >= 3 * len(self.servers):  # every server fails on this prompt while it answers others
                self.counts["aborted_prompts"] += 1
                return [Thought((), (), FinishReason.ABORT, self.version, seed + k) for k in range(n)], None

    @asynccontextmanager
    async def _room(self, server: Server) -> AsyncIterator[None]:
        """One of the server's slots; waiting for it counts as load."""
        server.load += 1
        try:
            async with self._slots[server.url]:
                yield
        finally:
            server.load -= 1

    async def _least_loaded(self, end: float) -> Server:
        while not (working := [s for s in self.servers if s.alive]):
            if self._hopeless():
                raise Refused(f"no vLLM server takes the present weights ({self._last_words()})")
            if time.monotonic() > max(end, self._answered + self.deadline):
                raise EngineUnavailable(
                    f"no vLLM server works, for {self.deadline:.0f} s ({self._last_words()})"
                )
            await self._pause(self.patience / 4, max(end, self._answered + self.deadline))
        return min(working, key=lambda s: s.load)

    def _hopeless(self) -> bool:
        return all(s.stuck > 1 for s in self.servers)

    def _failed(self, server: Server, why: str) -> None:
        """Leave a server out until it is healthy again."""
        server.alive, server.last_error, server.group = False, why, None
        server.failures += 1
        self.counts["server_failures"] += 1

    async def _take_back(self, server: Server) -> None:
        """Whenever a server is left out: ask for its health, with back-off, give it the present weights,
        and take it back.
        """
        wait = self.patience
        while not self._closed:  # an HTTP client may swallow a cancellation
            await asyncio.sleep(wait)
            if server.alive or not self._open.is_set():
                wait = self.patience
                continue
            wait = min(8 * self.patience, 2 * wait)
            try:
                if not await server.healthy(self._short):
                    continue
                if not server.card:  # it was not there at the beginning
                    await server.check(self.vocabulary)
                if server.card["max_model_len"] < self.max_model_len:
                    raise EngineUnavailable(
                        f"it reads {server.card['max_model_len']} tokens, the others {self.max_model_len}"
                    )
                mark = self._mark
                if self._synced and not await server.has_weights(mark, self._short):
                    if not self.lead:
                        continue  # rank 0 will give it the weights
                    await self._load(server, mark)
                if mark == self._mark:  # else there are newer weights by now
                    server.alive, server.stuck = True, 0
                    self.counts["servers_taken_back"] += 1
            except Exception as error:  # whatever it says, the others go on
                server.says_no(error)

    async def _sync(self, version: int) -> None:
        begin = time.perf_counter()
        self._open.clear()
        try:
            while any(s.in_flight for s in self.servers):
                await asyncio.sleep(0.002)
            self.timings["perf/weight_sync_drain_s"] = time.perf_counter() - begin
            begin = time.perf_counter()
            if self.lead:
                self._mark = f"{self.weights_dir.resolve()}@{version}-{uuid.uuid4().hex}"
                await asyncio.gather(*(self._load_or_leave(s, self._mark) for s in self.servers if s.alive))
            self.version, self._synced = version, True
        finally:
            self._open.set()
        end = time.monotonic() + self.deadline
        while self.lead and not any(
            s.alive for s in self.servers
        ):  # the first that comes back is given these weights
            if time.monotonic() > end or self._hopeless():
                raise EngineUnavailable(
                    f"no vLLM server took the weights of version {version} ({self._last_words()})"
                )
            await self._pause(self.patience / 4, end)
        self.timings["perf/weight_sync_load_s"] = time.perf_counter() - begin

    async def _load_or_leave(self, server: Server, mark: str) -> None:
        try:
            await self._load(server, mark)
        except Refused as error:
            self._failed(server, str(error))
            server.says_no(error)
            if not self._synced:
                raise
        except (self._httpx.HTTPError, EngineUnavailable, TimeoutError) as error:
            self._failed(server, repr(error))

    async def _load(self, server: Server, mark: str) -> None:
        if self.transfer == "nccl":
            return await server.receive_weights(self._state, mark, self.master_address, self.request_timeout)
        assert self._folder is not None
        await server.load_weights(self._folder.resolve(), mark)
