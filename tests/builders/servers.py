"""A real vLLM server as a child process, and a proxy that breaks connections in front of it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
import time
import urllib.request
from pathlib import Path

from tests.builders.processes import Forked, alone, free_port, start


class VLLMServer:
    """`vllm serve` on loopback with the flags of rollout/vllm_server.py."""

    def __init__(self, model: Path, log: Path, port: int | None = None):
        self.model, self.log, self.port = model, log, port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: Forked | None = None

    def start(self) -> VLLMServer:
        command = [
            "-m",
            "tests.scripts.vllm_serve",
            "--model",
            str(self.model),
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
            "--dtype",
            "float32",
            "--enforce-eager",
            "--max-model-len",
            "512",
            "--max-num-seqs",
            "32",
            "--kv-cache-memory-bytes",
            str(64 << 20),
            "--block-size",
            "32",
            "--logprobs-mode",
            "processed_logprobs",
            "--generation-config",
            "vllm",
            "--no-enable-chunked-prefill",
            "--distributed-executor-backend",
            "uni",
        ]
        environment = alone() | {
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine process runs its worker itself
            "OMP_NUM_THREADS": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
        }
        self.process = start(command, self.log, environment=environment)
        return self

    def ready(self, timeout: float = 180.0) -> VLLMServer:
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            assert self.process is not None and self.process.poll() is None, self.log.read_text()[-3000:]
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=2):
                    return self
            except OSError:
                time.sleep(0.5)
        raise TimeoutError(self.log.read_text()[-3000:])

    def kill(self) -> None:
        """Kill the server and its engine process at once, as the kernel does when memory runs out."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):  # it ended, or has no session yet
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.kill()
            self.process.wait()
            self.process = None


class Proxy:
    """Forwards TCP to `target`.

    `mode` says what happens to answers of /v1/completions: pass, refuse, reset (in the middle), hang, slow.
    """

    def __init__(self, target: int, port: int | None = None):
        self.target, self.mode, self.hit = target, "pass", 0
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        opening = asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.server = asyncio.run_coroutine_threadsafe(opening, self.loop).result(10)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self.target)
        state = {"completion": False}

        async def up() -> None:
            while data := await reader.read(65536):
                if data.startswith(b"POST /v1/completions"):
                    state["completion"] = True
                    if self.mode == "refuse":
                        break
                elif data.startswith((b"POST ", b"GET ")):
                    state["completion"] = False
                up_writer.write(data)
                await up_writer.drain()
            up_writer.close()

        async def down() -> None:
            while data := await up_reader.read(65536):
                if state["completion"] and self.mode != "pass":
                    self.hit += 1
                    if self.mode == "hang":
                        await asyncio.sleep(3600)
                    if self.mode == "reset":
                        writer.write(data[: len(data) // 2])
                        await writer.drain()
                        break
                    if self.mode == "slow":
                        await asyncio.sleep(0.3)
                writer.write(data)
                await writer.drain()
            writer.close()

        try:
            await asyncio.gather(up(), down(), return_exceptions=True)
        finally:
            writer.transport.abort()
            up_writer.transport.abort()

    def close(self) -> None:
        """Refuse all later connections."""

        async def end() -> None:
            self.server.close()
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.sleep(0.05)  # connections close in the turn after

        asyncio.run_coroutine_threadsafe(end(), self.loop).result(10)
        self.loop.call_soon_threadsafe(self.loop.stop)
