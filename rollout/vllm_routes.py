"""The routes of one vLLM server, and what differs between the versions of it: all that the client knows of vLLM's HTTP."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rollout.engine import ending
from rollout.types import FinishReason, Prompt, SamplingParams, Thought

SUPPORTED = ((0, 30), (0, 33))
"""vLLM versions whose routes this file was written for: from, and below."""


class EngineUnavailable(RuntimeError):
    """No server answered within the deadline; the message says what each of them said last."""


@dataclass
class Server:
    """What the client knows of one server; `client` is its httpx client."""

    url: str
    load: int = 0  # prompts that were given to it, those that wait for room included
    in_flight: int = 0
    alive: bool = True
    last_error: str = ""
    failures: int = 0
    card: dict[str, Any] = field(default_factory=dict)  # what it says of its model: id and max_model_len
    client: Any = field(default=None, repr=False)
    group: Any = field(default=None, repr=False)  # its NCCL group

    async def healthy(self, timeout: float | None = None) -> bool:
        """Whether it says so; connection errors are the caller's."""
        answer = await self.client.get("/health", **({"timeout": timeout} if timeout else {}))
        return answer.status_code == 200

    async def check(self) -> None:
        """Refuse at the start what would fail at the first sync, and note its model's card."""
        answer = await self.client.get("/version")
        if answer.status_code in (401, 403):
            raise EngineUnavailable(f"{self.url} refuses the token (engine.token_file): {answer.text[:200]}")
        facts = answer.json() if answer.status_code == 200 else {}
        ours = facts.get("server") == "rlpretrain"  # rollout/service.py: the same routes
        said, (low, high) = facts.get("version", "unknown"), SUPPORTED
        if not ours and not low <= tuple(int(part) if part.isdigit() else 0 for part in said.split(".")[:2]) < high:
            words = " to below ".join(".".join(map(str, version)) for version in SUPPORTED)
            raise EngineUnavailable(f"{self.url} runs vLLM {said}; its routes are known from {words}")
        if not ours and (await self.client.get("/is_paused")).status_code == 404:
            raise EngineUnavailable(f"{self.url} has no weight routes: start it with VLLM_SERVER_DEV_MODE=1")
        self.card = (await self.client.get("/v1/models")).json()["data"][0]

    async def load_weights(self, folder: Path, mark: str) -> None:
        """Pause, load, empty the caches, note the mark, resume."""
        await self.ask("/pause", params={"mode": "abort"})
        try:
            await self.ask("/collective_rpc", json={"method": "reload_weights", "kwargs": {"weights_path": str(folder)}})
            await self.ask("/reset_prefix_cache")
            await self.ask("/update_weight_version", json={"new_version": mark})
        finally:
            await self.ask("/resume")

    async def receive_weights(self, state: dict[str, Any], mark: str, host: str | None, timeout: float) -> None:
        """`load_weights` over NCCL. TimeoutError where the broadcast hangs; the group is then given up."""
        from rollout.vllm_nccl import NCCLTransfer

        await self.ask("/pause", params={"mode": "abort"})
        try:
            if self.group is None:
                size = (await self.client.get("/get_world_size")).json()["world_size"]
                self.group = NCCLTransfer(self.url, size, host=host, timeout=timeout)
            await asyncio.wait_for(asyncio.to_thread(self.group.send, state), timeout)
            await self.ask("/reset_prefix_cache")
            await self.ask("/update_weight_version", json={"new_version": mark})
        finally:
            await self.ask("/resume")

    async def has_weights(self, mark: str, timeout: float) -> bool:
        """Whether it says that it has the weights of this mark."""
        answer = await self.client.get("/weight_info", timeout=timeout)
        return answer.status_code == 200 and answer.json().get("weight_version") == mark

    async def ask(self, route: str, **what: Any) -> Any:
        """POST; EngineUnavailable for every answer but 200."""
        answer = await self.client.post(route, **what)
        if answer.status_code != 200:
            raise EngineUnavailable(f"{self.url}{route} answered {answer.status_code}: {answer.text[:300]}")
        return answer


def completion(model: str, prompt: Prompt, params: SamplingParams, n: int, seed: int) -> dict[str, Any]:
    """The body of `/v1/completions` that samples `n` thoughts."""
    return {
        "model": model, "prompt": list(prompt.token_ids), "n": n, "seed": seed, "max_tokens": params.max_thought_tokens,
        "temperature": params.temperature, "top_p": params.top_p, "top_k": params.top_k, "logprobs": 0,
        "return_token_ids": True, "ignore_eos": True, "stop_token_ids": [*prompt.stop_ids, *params.eos_ids],
        "stop": list(prompt.stop_strings), "skip_special_tokens": False,
    }  # fmt: skip


def thoughts(said: Any, prompt: Prompt, params: SamplingParams, seed: int, version: int) -> list[Thought] | None:
    """The thoughts of an answer to `completion`; None if the server aborted one. KeyError for another form of answer."""
    choices: Sequence[dict[str, Any]] = sorted(said["choices"], key=lambda c: c["index"])
    if any(c["finish_reason"] == FinishReason.ABORT for c in choices):
        return None
    return [_thought(c, prompt, params, seed, version) for c in choices]


def _thought(choice: dict[str, Any], prompt: Prompt, params: SamplingParams, seed: int, version: int) -> Thought:
    ids, logps = tuple(choice["token_ids"]), tuple(map(float, choice["logprobs"]["token_logprobs"]))
    if len(ids) != len(logps) or not all(map(math.isfinite, logps)):
        raise RuntimeError(f"a vLLM server gave {len(logps)} log-probs, some not finite, for {len(ids)} tokens")
    by_string = isinstance(choice.get("stop_reason"), str)
    own = choice.get("seed", seed + choice["index"])  # vLLM's rule, where the answer does not say
    return Thought(ids, logps, ending(ids, prompt, params, by_string), version, own)
