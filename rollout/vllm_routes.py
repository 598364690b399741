"""The routes of one vLLM server: everything that the client knows of vLLM's HTTP interface."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from rollout.engine import ending
from rollout.servers import EngineUnavailable, Refused, Server, message_of
from rollout.types import FinishReason, Prompt, SamplingParams, Thought
from rollout.vllm_streams import stream_completion

BAN = -100
"""The bias of a banned token: vLLM's servers raise any lower bias to it."""
SUPPORTED = ((0, 30), (0, 34))
"""vLLM versions whose routes this file knows: the first, and the first that is too new."""


@dataclass
class VLLMRoutes(Server):
    """One vLLM server, or `rlpretrain serve`."""

    product: ClassVar[str] = "vLLM"
    sampling_route: ClassVar[str] = "/v1/completions"

    def request(self, prompt: Prompt, params: SamplingParams, n: int, seed: int) -> dict[str, Any]:
        """`completion` of its own model."""
        return completion(self.card["id"], prompt, params, n, seed)

    async def sample(self, body: Mapping[str, Any]) -> Any:
        """In parts, if weights may change meanwhile."""
        if not self.keeps:
            return await super().sample(body)
        return await stream_completion(self.client, self.sampling_route, body, lambda: self.version)

    def thoughts(
        self, body: Any, prompt: Prompt, params: SamplingParams, seed: int, version: int
    ) -> list[Thought] | None:
        """See `thoughts`."""
        return thoughts(body, prompt, params, seed, version)

    async def check(self, vocabulary: int | None = None, folder: Path | None = None) -> None:
        """Find at the start what would fail at the first sync, and note its model's card.

        Raises Refused if it does not know the token, the routes, the vocabulary or the folder.
        """
        answer = await self.client.get("/version")
        if answer.status_code in (401, 403):
            raise Refused(f"{self.url} refuses the token (engine.token_file): {answer.text[:200]}")
        facts = answer.json() if answer.status_code == 200 else {}
        ours = self.ours = facts.get("server") == "rlpretrain"  # rollout/service.py: the same routes
        version = facts.get("version", "unknown")
        if not ours and not _is_supported(version):
            known = " to below ".join(".".join(map(str, bound)) for bound in SUPPORTED)
            raise Refused(f"{self.url} runs vLLM {version}; its routes are known from {known}")
        if ours and self.keeps:
            raise Refused(
                f"{self.url} is `rlpretrain serve`, which finishes thoughts before it loads weights: set "
                "engine.updates to drained, or use vLLM's own server"
            )
        if self.wants_changes and not ours:
            raise Refused(
                f"{self.url} is vLLM's own server, which takes no changes of weights: set engine.transfer to "
                "file, or use `rlpretrain serve`"
            )
        if not ours and (await self.client.get("/is_paused")).status_code == 404:
            raise Refused(f"{self.url} has no weight routes: start it with VLLM_SERVER_DEV_MODE=1")
        self.card = (await self.client.get("/v1/models")).json()["data"][0]
        if vocabulary is not None:
            await self.check_vocabulary(vocabulary)
        if folder is not None and self.ours:
            await self.check_folder(folder)

    async def check_vocabulary(self, size: int) -> None:
        """Raise Refused unless the server's model has `size` tokens: it would not take the weights.

        Such a model samples after the id `size - 1` and refuses the id `size`.
        """
        params = SamplingParams(1, temperature=0.0)
        last = await self.client.post(
            "/v1/completions", json=completion(self.card["id"], Prompt((size - 1,), ()), params, 1, 0)
        )
        more = await self.client.post(
            "/v1/completions", json=completion(self.card["id"], Prompt((size,), ()), params, 1, 0)
        )
        if last.status_code == 400 or more.status_code == 200:
            raise self.other_vocabulary(size, "more" if more.status_code == 200 else "fewer")

    async def check_folder(self, folder: Path) -> None:
        """Raise Refused if `rlpretrain serve` may not read the folder; vLLM's server reads any path."""
        probe = folder / ".probe"
        probe.mkdir(parents=True, exist_ok=True)
        try:
            call = {"method": "reload_weights", "kwargs": {"weights_path": str(probe.resolve())}}
            answer = await self.client.post("/collective_rpc", json=call)  # 400 for the empty folder
        finally:
            probe.rmdir()
        if answer.status_code == 403:
            raise Refused(
                f"{self.url} may not read engine.weights_dir, {folder.resolve()}: {message_of(answer)}. "
                "Start it with --weights-dir, a folder that engine.weights_dir is or lies in"
            )

    @asynccontextmanager
    async def paused(self) -> AsyncIterator[None]:
        """The server samples nothing meanwhile; thoughts in flight are aborted, or kept for later.

        It is resumed also after an error, and the error of the block is the one that is raised.
        """
        await self.ask("/pause", params={"mode": "keep" if self.keeps else "abort"})
        try:
            yield
        except BaseException:
            with suppress(Exception):
                await self.resume()
            raise
        await self.resume()

    async def resume(self) -> None:
        """Let it sample again. vLLM closes the connection after an answer of 500: ask a second time then."""
        try:
            await self.ask("/resume")
        except EngineUnavailable:  # it answered
            raise
        except Exception:
            await self.ask("/resume")

    async def load_weights(self, folder: Path, mark: str) -> None:
        """Pause, load, empty the caches, note the mark, resume."""
        async with self.paused():
            await self.ask(
                "/collective_rpc", json={"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
            )
            await self._settle(mark)

    async def receive_weights(
        self, state: Mapping[str, Any], mark: str, host: str | None, timeout: float
    ) -> None:
        """`load_weights` over NCCL. Raises TimeoutError if the broadcast hangs, and gives up its group."""
        from rollout.vllm_nccl import NCCLTransfer

        async with self.paused():
            if self.group is None:
                size = (await self.client.get("/get_world_size")).json()["world_size"]
                self.group = NCCLTransfer(self.url, size, host=host, timeout=timeout)
            await asyncio.wait_for(asyncio.to_thread(self.group.send, state), timeout)
            await self._settle(mark)

    async def _settle(self, mark: str) -> None:
        """What follows new weights, before anything is sampled."""
        await self.empty_cache()
        await self.ask("/update_weight_version", json={"new_version": mark})
        self.version = self.loading

    async def has_weights(self, mark: str, timeout: float) -> bool:
        """Whether it reports the weights of this mark."""
        answer = await self.client.get("/weight_info", timeout=timeout)
        return answer.status_code == 200 and answer.json().get("weight_version") == mark

    async def empty_cache(self) -> None:
        """Empty the prefix cache; thoughts in flight are read again by the present weights."""
        await self.ask("/reset_prefix_cache", params={"reset_running_requests": self.keeps})


def _is_supported(version: str) -> bool:
    """Whether this file knows the routes of a vLLM version."""
    low, high = SUPPORTED
    numbers = tuple(int(part) if part.isdigit() else 0 for part in version.split(".")[:2])
    return low <= numbers < high


def completion(model: str, prompt: Prompt, params: SamplingParams, n: int, seed: int) -> dict[str, Any]:
    """The body of `/v1/completions` that samples `n` thoughts.

    A banned id has a bias of -100, the lowest that vLLM's servers accept. It is added before the temperature,
    which they bound by 2: at least 50 nats are left.
    """
    bias = {str(token): BAN for token in params.banned_ids}
    return {
        "model": model,
        "prompt": list(prompt.token_ids),
        "n": n,
        "seed": seed,
        "max_tokens": params.max_thought_tokens,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k,
        "logprobs": 0,
        "return_token_ids": True,
        "ignore_eos": True,
        "stop_token_ids": [*prompt.stop_ids, *params.eos_ids],
        "stop": list(prompt.stop_strings),
        "skip_special_tokens": False,
    } | ({"logit_bias": bias} if bias else {})


def thoughts(
    body: Any, prompt: Prompt, params: SamplingParams, seed: int, version: int
) -> list[Thought] | None:
    """The thoughts in the answer to `completion`; None if the server aborted one.

    Raises KeyError for an answer of another form.
    """
    choices: Sequence[dict[str, Any]] = sorted(body["choices"], key=lambda c: c["index"])
    if any(c["finish_reason"] == FinishReason.ABORT for c in choices):
        return None
    return [_thought(c, prompt, params, seed, version) for c in choices]


def _thought(
    choice: dict[str, Any], prompt: Prompt, params: SamplingParams, seed: int, version: int
) -> Thought:
    ids, logps = tuple(choice["token_ids"]), tuple(map(float, choice["logprobs"]["token_logprobs"]))
    if len(ids) != len(logps) or not all(map(math.isfinite, logps)):
        raise RuntimeError(
            f"a vLLM server gave {len(logps)} log-probs, some not finite, for {len(ids)} tokens"
        )
    versions = choice.get("versions") or [(0, version)]  # of an answer that came whole
    by_string = isinstance(choice.get("stop_reason"), str)
    thought_seed = choice.get("seed", seed + choice["index"])  # vLLM's rule, if the answer has no seed
    reason = ending(ids, prompt, params, by_string)
    return Thought(ids, logps, reason, versions[0][1], thought_seed, updates=tuple(versions[1:]))
