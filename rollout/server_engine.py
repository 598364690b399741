"""Client of one or several servers that sample over HTTP; a subclass names the product and its routes.

`handover` says how weights travel; as a rule as safetensors through `weights_dir`, a folder that trainer
and servers share.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import torch

from rollout.engine import EngineInfo, check_request
from rollout.handover import NCCL, Changes, Files, Handover
from rollout.server_pool import GRACE, PoolSettings, ServerPool
from rollout.server_sampling import sample_prompts
from rollout.servers import EngineUnavailable, Server
from rollout.types import Prompt, SamplingParams, Thought, WeightSource
from rollout.weights import complete, parameters_of

log = logging.getLogger(__name__)


class ServerEngine:
    """Samples from servers: least loaded first, at most `concurrency` prompts in flight each.

    `model` is the folder or hub id of the checkpoint that the servers run; its configuration tells which
    weights there are. `weights_dir` is the folder that weights pass through, as trainer and servers see it;
    no other trainer may use it. `dtype` is the precision in which weights are sent; the trainer's by default.
    `vocabulary` is the number of tokens of the trained model.

    A request that fails is sent again after a pause, to another server if there is one. A server that fails
    is left out; its health is asked after `patience` seconds, then after up to eight times as many, and it is
    taken back with the present weights. `request_timeout` bounds one answer. After `deadline` seconds without
    a working server, `sample` and `sync` raise EngineUnavailable. An error that waiting cannot mend (another
    vocabulary, a folder that servers may not read) is raised at once if all servers give it.

    `block_size` is the largest number of tokens per block of the servers' prefix caches; None if there is no
    such cache. `lead` is true on rank 0, which hands over the weights; `share` gives rank 0's value to
    all ranks and makes them wait for it. `say` gets a line for every ten seconds of waiting. A `frozen`
    engine is never synced: its servers keep their weights, and need no access to `weights_dir`. With
    `in_flight`, weights change while thoughts are being sampled.

    All requests run on an event loop in a thread of its own, so any thread and any loop may `sample`.
    """

    kind: ClassVar[str]
    """What `engine.name` calls it."""
    routes: type[Server]
    """What is known of one server."""

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
        dtype: str | None = None,
        lead: bool = True,
        vocabulary: int | None = None,
        say: Callable[[str], None] = log.warning,
        share: Callable[[Any], Any] = lambda value: value,
        frozen: bool = False,
        in_flight: bool = False,
    ) -> None:
        if not urls:
            raise ValueError(f"engine {self.kind} needs the URL of at least one server")
        self.weights_dir, self.lead, self.share = Path(weights_dir), lead, share
        self.block_size = block_size
        self.timings: dict[str, float] = {}
        self._parameters = parameters_of(model, revision=revision, trust_remote_code=trust_remote_code)
        self._dtype: torch.dtype | None = getattr(torch, dtype) if dtype else None
        settings = PoolSettings(
            concurrency=concurrency,
            request_timeout=request_timeout,
            deadline=deadline,
            patience=patience,
            lead=lead,
            vocabulary=vocabulary,
            weights_dir=self.weights_dir,
            transfer=transfer,
            frozen=frozen,
            in_flight=in_flight and not frozen,
        )
        keeps = settings.in_flight
        wants = transfer == "changes"
        servers = [
            self.routes(url.rstrip("/"), version=version, keeps=keeps, wants_changes=wants) for url in urls
        ]
        self._handover = self._make_handover(transfer, master_address, request_timeout)
        self.pool = ServerPool(servers, settings, version, say, self._handover)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rollout-client", daemon=True)
        self._thread.start()
        self._closed = False
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        try:
            self._run(self.pool.start(headers), deadline + GRACE + 4 * request_timeout)
        except BaseException:
            self.close()
            raise

    def _make_handover(self, transfer: str, master_address: str | None, timeout: float) -> Handover:
        """How weights travel, by the name of it."""
        if transfer == "nccl":
            return NCCL(master_address, timeout)
        if transfer == "changes":
            return Changes(self.weights_dir, self._parameters)
        return Files(self.weights_dir)

    @property
    def version(self) -> int:
        """The version of the weights that thoughts are sampled from now."""
        return self.pool.version

    @property
    def servers(self) -> Sequence[Server]:
        """What is known of each server."""
        return self.pool.servers

    @property
    def counts(self) -> Counter[str]:
        """Counters since the start."""
        return self.pool.counts

    @property
    def max_model_len(self) -> int:
        """The longest prompt plus thought that all servers take."""
        assert self.pool.max_model_len is not None, "set when the pool starts"
        return self.pool.max_model_len

    @property
    def num_engines(self) -> int:
        """Servers that work."""
        return max(1, sum(server.alive for server in self.servers))

    @property
    def info(self) -> EngineInfo:
        """The servers that work now."""
        return EngineInfo(
            max_model_len=self.max_model_len,
            block_size=self.block_size,
            num_engines=self.num_engines,
            updates_in_flight=self.pool.settings.in_flight,
            timings=self.timings,
        )

    async def sample(
        self, prompts: Sequence[Prompt], params: SamplingParams, n: int, seeds: Sequence[int]
    ) -> list[list[Thought]]:
        """Draw `n` thoughts for each prompt, one request per prompt; see `Engine.sample`.

        Thought k of prompt i is drawn with the seed `seeds[i] + k`, so thoughts do not depend on the server.
        A prompt on which every server keeps failing gives thoughts that end in ABORT, never trained.
        Raises ValueError for what a server refuses, EngineUnavailable if none works.
        """
        if self._closed:
            raise RuntimeError("this engine is closed")
        check_request(prompts, params, n, seeds, vocabulary=math.inf, most=self.max_model_len, strings=True)
        work = asyncio.run_coroutine_threadsafe(
            sample_prompts(self.pool, list(prompts), params, n, list(seeds)), self._loop
        )
        return await asyncio.wrap_future(work)

    def sync(self, weights: WeightSource, version: int) -> None:
        """Write the weights to `weights_dir` and let every server load them.

        Requests in flight are finished first, or wait meanwhile with `in_flight`, and caches are emptied. All
        ranks call this; rank 0 writes and tells the servers. A server that cannot load is left out until it
        can. Raises ValueError if parameters are missing, EngineUnavailable if no server took the weights.
        """
        if self._closed:
            raise RuntimeError("this engine is closed")
        if self.pool.settings.frozen:
            raise RuntimeError("this engine is frozen: its servers keep their weights")
        begin = time.perf_counter()
        state: dict[str, torch.Tensor] = {}
        for name, tensor in weights():  # all ranks iterate, since gathering sharded weights needs all
            if self.lead:
                state[name] = tensor.detach().to("cpu", self._dtype, copy=True).contiguous()
        self.timings["perf/weight_sync_gather_s"] = time.perf_counter() - begin
        if self.lead:
            begin = time.perf_counter()
            self._handover.put(complete(state, self._parameters), version, self.pool.mark)
            self.timings["perf/weight_sync_write_s"] = time.perf_counter() - begin
            self.timings["perf/weight_sync_mib"] = self._handover.sent / 2**20
        settings = self.pool.settings
        times = self._run(self.pool.sync(version), settings.deadline + 4 * settings.request_timeout)
        self.timings |= times
        self.pool.mark = self.share(self.pool.mark)
        for server in self.servers:  # of a rank that does not hand over
            server.version = version if server.alive else server.version

    def reset_prefix_cache(self) -> None:
        """Empty the prefix cache of every server."""
        for server in self.servers:
            if server.alive:
                self._run(server.empty_cache(), self.pool.settings.request_timeout)

    def health(self) -> dict[str, Any]:
        """Kind, version, what is known of each server, counters since the start."""
        return {
            "kind": self.kind,
            "version": self.version,
            "shares_weights": False,
            "closed": self._closed,
            "max_model_len": self.pool.max_model_len,
            "servers": [server.facts() for server in self.servers],
            **self.counts,
        }

    def close(self) -> None:
        """Close the connections; the servers go on. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        with suppress(EngineUnavailable):  # tasks that do not end now end with the process
            self._run(self.pool.end(), 10.0)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10.0)
        if self.lead:
            self._handover.close()

    def _run(self, work: Coroutine[Any, Any, Any], timeout: float) -> Any:
        """Run on the client's loop and wait for at most `timeout` seconds."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(timeout)
        except TimeoutError:
            future.cancel()
            who, why = self.pool.product, self.pool.last_errors()
            message = f"no answer within {timeout:.0f} s from the {who} servers ({why})"
            raise EngineUnavailable(message) from None
