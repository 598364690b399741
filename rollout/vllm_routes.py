"""The routes of one vLLM server, and what differs between the versions of it: all that the client knows of
vLLM's HTTP.
"""

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

    says_all = True  # a command line prints the message without a traceback


class Refused(EngineUnavailable):
    """A server refuses for good: asked again it would say the same. The message says what to do."""


TRANSIENT = (408, 425, 429)
"""Answers of the 4xx kind that another time may turn out otherwise."""


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
    ours: bool = False  # `rlpretrain serve`, not vLLM's own server
    stuck: int = 0  # how often it said no to the weights, in the same words

    def says_no(self, error: Exception) -> None:
        """Note an error; one for good, or the same again from a server that is healthy, is not waited out."""
        same = isinstance(error, EngineUnavailable) and str(error) in self.last_error
        self.stuck = (
            2
            if isinstance(error, Refused)
            else self.stuck + 1
            if same
            else int(isinstance(error, EngineUnavailable))
        )
        self.last_error = str(error) if isinstance(error, EngineUnavailable) else repr(error)

    async def healthy(self, timeout: float | None = None) -> bool:
        """Whether it says so; connection errors are the caller's."""
        answer = await self.client.get("/health", **({"timeout": timeout} if timeout else {}))
        return answer.status_code == 200

    async def check(self, vocabulary: int | None = None, folder: Path | None = None) -> None:
        """Refuse at the start what would fail at the first sync, and note its model's card."""
        answer = await self.client.get("/version")
        if answer.status_code in (401, 403):
            raise Refused(f"{self.url} refuses the token (engine.token_file): {answer.text[:200]}")
        facts = answer.json() if answer.status_code == 200 else {}
        ours = self.ours = facts.get("server") == "rlpretrain"  # rollout/service.py: the same routes
        said, (low, high) = facts.get("version", "unknown"), SUPPORTED
        if (
            not ours
            and not low <= tuple(int(part) if part.isdigit() else 0 for part in said.split(".")[:2]) < high
        ):
            words = " to below ".join(".".join(map(str, version)) for version in SUPPORTED)
            raise Refused(f"{self.url} runs vLLM {said}; its routes are known from {words}")
        if not ours and (await self.client.get("/is_paused")).status_code == 404:
            raise Refused(f"{self.url} has no weight routes: start it with VLLM_SERVER_DEV_MODE=1")
        self.card = (await self.client.get("/v1/models")).json()["data"][0]
        if vocabulary is not None:
            await self.check_vocabulary(vocabulary)
        if folder is not None and self.ours:
            await self.check_folder(folder)

    async def check_vocabulary(self, size: int) -> None:
        """Refused unless the server's model knows the id `size - 1` and no id from `size` on: it would not
        take the weights.
        """
        params = SamplingParams(1, temperature=0.0)
        last = await self.client.post(
            "/v1/completions", json=completion(self.card["id"], Prompt((size - 1,), ()), params, 1, 0)
        )
        more = await self.client.post(
            "/v1/completions", json=completion(self.card["id"], Prompt((size,), ()), params, 1, 0)
        )
        if last.status_code == 400 or more.status_code == 200:
            raise Refused(
                f"{self.url} serves a model of {'more' if more.status_code == 200 else 'fewer'} than {size} "
                f"tokens, and this run trains one of {size}: both must begin with the same checkpoint. Where "
                "the run adds the tags of a thought, write a base that has them (rlpretrain tag MODEL --out "
                "DIR), serve DIR and train from it"
            )

    async def check_folder(self, folder: Path) -> None:
        """Refused if our own service may not read the folder that weights pass through; vLLM's server
        reads any path.
        """
        probe = folder / ".probe"
        probe.mkdir(parents=True, exist_ok=True)
        try:
            what = {"method": "reload_weights", "kwargs": {"weights_path": str(probe.resolve())}}
            answer = await self.client.post("/collective_rpc", json=what)  # 400: it is empty, as it should be
        finally:
            probe.rmdir()
        if answer.status_code == 403:
            raise Refused(
                f"{self.url} may not read engine.weights_dir, {folder.resolve()}: {_message(answer)}. Start "
                "it with --weights-dir, a folder that engine.weights_dir is or lies in"
            )

    async def load_weights(self, folder: Path, mark: str) -> None:
        """Pause, load, empty the caches, note the mark, resume."""
        await self.ask("/pause", params={"mode": "abort"})
        try:
            await self.ask(
                "/collective_rpc", json={"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
            )
            await self.ask("/reset_prefix_cache")
            await self.ask("/update_weight_version", json={"new_version": mark})
        finally:
            await self.ask("/resume")

    async def receive_weights(
        self, state: dict[str, Any], mark: str, host: str | None, timeout: float
    ) -> None:
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
        """POST; EngineUnavailable for every answer but 200, Refused where asking again cannot help."""
        answer = await self.client.post(route, **what)
        if answer.status_code != 200:
            for_good = 400 <= answer.status_code < 500 and answer.status_code not in TRANSIENT
            kind = Refused if for_good else EngineUnavailable
            raise kind(f"{self.url}{route} answered {answer.status_code}: {_message(answer)}")
        return answer


def body_of(answer: Any) -> Any:
    """The body of an answer; KeyError, as for one of another form, where it is no JSON: the server's
    fault, not the caller's.
    """
    try:
        return answer.json()
    except ValueError as error:
        raise KeyError(f"an answer that is no JSON: {error}") from None


def _message(answer: Any) -> str:
    """What an error says, in a line."""
    try:
        said = answer.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        said = answer.text
    return " ".join(str(said).split())[:300]


def completion(model: str, prompt: Prompt, params: SamplingParams, n: int, seed: int) -> dict[str, Any]:
    """The body of `/v1/completions` that samples `n` thoughts."""
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
    }


def thoughts(
    said: Any, prompt: Prompt, params: SamplingParams, seed: int, version: int
) -> list[Thought] | None:
    """The thoughts of an answer to `completion`; None if the server aborted one. KeyError for another form
    of answer.
    """
    choices: Sequence[dict[str, Any]] = sorted(said["choices"], key=lambda c: c["index"])
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
    by_string = isinstance(choice.get("stop_reason"), str)
    own = choice.get("seed", seed + choice["index"])  # vLLM's rule, where the answer does not say
    return Thought(ids, logps, ending(ids, prompt, params, by_string), version, own)
