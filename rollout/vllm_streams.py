"""Thoughts of a vLLM server that arrive in parts, so that the client knows which weights drew which ids."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Streamed:
    """The answer to `completion`, put together of its parts in the form of one that comes whole.

    Each choice also has `versions`: (index of an id, version) where the first id, or another version, begins.
    """

    status_code: int
    text: str = ""
    choices: dict[int, dict[str, Any]] = field(default_factory=dict)

    def json(self) -> dict[str, Any]:
        """The body."""
        return {"choices": list(self.choices.values())}

    def add(self, part: Mapping[str, Any], version: int) -> None:
        """Append a part of a choice, whose ids came from weights of `version`."""
        blank = {"index": part["index"], "token_ids": [], "logprobs": {"token_logprobs": []}, "versions": []}
        choice = self.choices.setdefault(part["index"], blank | {"finish_reason": None})
        ids = part.get("token_ids") or []
        if ids and (not choice["versions"] or choice["versions"][-1][1] != version):
            choice["versions"].append((len(choice["token_ids"]), version))
        choice["token_ids"] += ids
        choice["logprobs"]["token_logprobs"] += (part.get("logprobs") or {}).get("token_logprobs") or []
        for name in ("finish_reason", "stop_reason"):
            if part.get(name) is not None:
                choice[name] = part[name]


async def stream_completion(
    client: Any, route: str, body: Mapping[str, Any], version: Callable[[], int]
) -> Streamed:
    """Post a completion and read its parts; `version` gives the present one of the server's weights.

    Raises KeyError for an answer that ends too early or has another form.
    """
    async with client.stream("POST", route, json={**body, "stream": True}) as answer:
        if answer.status_code != 200:
            await answer.aread()
            return Streamed(answer.status_code, answer.text)
        whole = Streamed(200)
        async for line in answer.aiter_lines():
            kind, _, text = line.partition(": ")
            if text == "[DONE]":
                return whole
            if kind == "data":
                for part in _parse(text)["choices"]:
                    whole.add(part, version())
    raise KeyError("the answer ended before its last part")


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise KeyError(f"a part of the answer is not JSON: {error}") from None
