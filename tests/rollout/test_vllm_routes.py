"""`VLLMRoutes` against a real socket: which error is raised, and that the server is resumed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from rollout.servers import EngineUnavailable
from rollout.vllm_routes import VLLMRoutes

Answer = Callable[[str, int], tuple[int, bool] | None]
"""Of a route and how often it was asked: the status and whether the connection is closed afterwards; None
closes it without an answer."""


def load(answer: Answer, asked: list[str]) -> None:
    """Load weights into a server that answers so; `asked` gets the routes in order."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await reader.readuntil(b"\r\n\r\n"):
            size = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
            await reader.readexactly(int(size[0].split(b":")[1]) if size else 0)
            route = head.split(b" ")[1].decode().split("?")[0]
            asked.append(route)
            reply = answer(route, asked.count(route))
            if reply is not None:
                writer.write(b"HTTP/1.1 %d X\r\nContent-Length: 2\r\n\r\n{}" % reply[0])
            if reply is None or reply[1]:
                break
        writer.close()

    async def both() -> None:
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as listening:
            url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
            server = VLLMRoutes(url)
            async with httpx.AsyncClient(base_url=url, timeout=10.0) as server.client:
                await server.load_weights(Path("folder"), "mark")

    asyncio.run(both())


def test_a_server_whose_connection_ends_after_an_error_is_resumed():
    """uvicorn closes the connection after an unhandled exception; the next request on it may find it open."""

    def answer(route: str, count: int) -> tuple[int, bool] | None:
        if route == "/resume" and count == 1:
            return None
        return (500 if route == "/collective_rpc" else 200), False

    asked: list[str] = []
    with pytest.raises(EngineUnavailable, match="/collective_rpc answered 500"):
        load(answer, asked)
    assert asked == ["/pause", "/collective_rpc", "/resume", "/resume"]


@pytest.mark.parametrize("resume", [None, (500, True)])
def test_the_error_of_loading_is_raised_and_not_that_of_resuming(resume):
    def answer(route: str, count: int) -> tuple[int, bool] | None:
        return resume if route == "/resume" else ((500 if route == "/collective_rpc" else 200), False)

    with pytest.raises(EngineUnavailable, match="/collective_rpc answered 500"):
        load(answer, [])


def test_a_server_that_cannot_be_resumed_after_loading_is_an_error():
    with pytest.raises(EngineUnavailable, match="/resume answered 500"):
        load(lambda route, count: ((500 if route == "/resume" else 200), False), [])


def test_weights_are_loaded_between_pause_and_resume():
    asked: list[str] = []
    load(lambda route, count: (200, False), asked)
    assert asked == ["/pause", "/collective_rpc", "/reset_prefix_cache", "/update_weight_version", "/resume"]
