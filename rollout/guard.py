"""The ASGI middleware in front of the rollout service: its token, and limits on bodies and requests."""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from rollout.wire import Limits

log = logging.getLogger(__name__)
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]


class Guard:
    """Answers 401, 413 and 429 before a body is read, 408, 413 and 429 while it is read.

    An exception of the service becomes a 500 without details. `sampling` are the routes that the limit on
    requests counts. `count(scope, status)` is called for every answer.
    """

    def __init__(
        self,
        app: Any,
        token: str | None,
        limits: Limits,
        sampling: Sequence[str],
        count: Callable[[Message, int], None],
    ):
        self.app, self.limits, self.sampling, self.count = app, limits, frozenset(sampling), count
        self.token = token.encode() if token else None
        self.busy = self.held = 0

    async def __call__(self, scope: Message, receive: Receive, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        started = False

        async def counting(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                self.count(scope, message["status"])
            await send(message)

        refusal = self._refusal(scope["path"], dict(scope["headers"]))
        if refusal is not None:
            return await refusal(scope, receive, counting)
        samples, held = scope["path"] in self.sampling, [0]
        self.busy += samples
        try:
            await self.app(scope, self._bounded(receive, held), counting)
        except Exception:
            log.exception("%s failed", scope["path"])
            if not started:
                await problem(500, "the service failed on this; its log has more")(scope, receive, counting)
        finally:
            self.busy -= samples
            self.held -= held[0]

    def _refusal(self, path: str, headers: dict[bytes, bytes]) -> JSONResponse | None:
        if self.token and path != "/health":
            scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(token.strip(), self.token):
                return problem(401, "this service needs its bearer token", {"WWW-Authenticate": "Bearer"})
        length = headers.get(b"content-length", b"0")[:20]
        if not length.isdigit() or int(length) > self.limits.body_bytes:
            return problem(413, f"the body may have {self.limits.body_bytes} bytes")
        if path in self.sampling and self.busy >= self.limits.requests:
            return problem(
                429, f"{self.busy} requests are in flight, and that is the limit", {"Retry-After": "1"}
            )
        return None

    def _bounded(self, receive: Receive, held: list[int]) -> Receive:
        """`receive` with limits on size and time until the body is complete."""
        complete = False

        async def bounded() -> Message:
            nonlocal complete
            if complete:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), self.limits.body_s)
            except TimeoutError:
                raise HTTPException(
                    408, f"a part of the body did not come within {self.limits.body_s:g} s"
                ) from None
            size = len(message.get("body", b""))
            held[0] += size
            self.held += size
            if held[0] > self.limits.body_bytes:
                raise HTTPException(413, f"the body may have {self.limits.body_bytes} bytes")
            if self.held > self.limits.held_bytes:
                raise HTTPException(429, "too many large bodies at a time", {"Retry-After": "1"})
            complete = not message.get("more_body", False)
            return message

        return bounded


def problem(status: int, message: str, headers: Any = None) -> JSONResponse:
    """An error in vLLM's form."""
    kind = "BadRequestError" if status < 500 else "InternalServerError"
    content = {"error": {"message": message, "type": kind, "param": None, "code": status}}
    return JSONResponse(content, status, headers)
