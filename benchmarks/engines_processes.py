"""Child processes of `benchmarks.engines`: trainings, and a vLLM server."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.builders.servers import free_port


@contextmanager
def child(command: list[str], log: Path, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """A command in a process group of its own, one thread per process; the group is killed at the end."""
    values = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"} | environment
    with log.open("ab") as output:
        process = subprocess.Popen(command, env=values, stdout=output, stderr=output, start_new_session=True)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path, timeout: float) -> None:
    """Return when the server answers; RuntimeError with the end of its log if it ends, or is too slow."""
    end = time.monotonic() + timeout
    while True:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=2).close()
            return
        except OSError:
            if process.poll() is not None or time.monotonic() > end:
                words = log.read_text(errors="replace")[-2000:]
                raise RuntimeError(f"the server does not answer; the end of {log}:\n{words}") from None
        time.sleep(0.5)


@contextmanager
def server(model: Path, log: Path, timeout: float = 900.0) -> Iterator[str]:
    """A vLLM server on loopback, as a child process; its address once it answers."""
    port = free_port()
    flags = (
        f"--host 127.0.0.1 --port {port} --dtype float32 --enforce-eager --max-num-seqs 256 --block-size 32"
    )
    flags += f" --no-enable-chunked-prefill --kv-cache-memory-bytes {100 << 20}"
    flags += " --logprobs-mode processed_logprobs --generation-config vllm"
    command = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(model),
        *flags.split(),
    ]
    log.unlink(missing_ok=True)
    with child(command, log, VLLM_SERVER_DEV_MODE="1", VLLM_LOGGING_LEVEL="WARNING") as process:
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(url, process, log, timeout)
        yield url
