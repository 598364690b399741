"""Python commands and ranks in processes forked from one that has imported torch, transformers, TRL and vLLM.

An interpreter of its own spends ten to twenty seconds of a core on these imports. Start one with `subprocess`
only where a test is about a fresh interpreter.
"""

from __future__ import annotations

import atexit
import importlib
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
PROCESSES = multiprocessing.get_context("forkserver")


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def warm() -> None:
    """Start the process that others are forked from, if it is not there yet."""
    PROCESSES.set_forkserver_preload(["tests.builders.imported"])
    forkserver.ensure_running()


def alone() -> dict[str, str]:
    """This process's environment without what a launcher, DeepSpeed or vLLM has left in it."""
    launched = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {name: value for name, value in os.environ.items() if name not in launched}


class Forked:
    """A process with the methods of `subprocess.Popen`."""

    def __init__(self, process: Any):
        self._process = process
        process.start()
        self.pid: int = process.pid
        self.terminate, self.kill = process.terminate, process.kill

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int | None:
        self._process.join(timeout)
        if self._process.is_alive():
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
        return self._process.exitcode


def start(
    words: Sequence[str],
    out: Path,
    err: Path | None = None,
    folder: Path = ROOT,
    environment: Mapping[str, str] | None = None,
) -> Forked:
    """`python WORDS` in the background, where WORDS are a script, -m MODULE or -c CODE, and their arguments.

    Its output is appended to the files `out` and `err`. `environment` is the whole of it, as for subprocess.
    It is killed with this process.
    """
    warm()
    given = (list(map(str, words)), out, err or out, folder, dict(environment or alone()))
    return Forked(PROCESSES.Process(target=_command, args=given, daemon=True))


def python(
    *words: str, folder: Path = ROOT, environment: Mapping[str, str] | None = None, timeout: float = 280
) -> subprocess.CompletedProcess[str]:
    """`python WORDS`, as `subprocess.run` would return it."""
    return ranks(1, *words, folder=folder, environment=environment, timeout=timeout, joined=False)


def ranks(
    number: int,
    *words: str,
    folder: Path = ROOT,
    environment: Mapping[str, str] | None = None,
    timeout: float = 280,
    joined: bool = True,
) -> subprocess.CompletedProcess[str]:
    """`python WORDS` in each of `number` ranks, with torchrun's variables if `joined`.

    The first that fails ends the others, and its exit code is returned.
    """
    environment = dict(environment or alone())
    shared = {"WORLD_SIZE": str(number), "LOCAL_WORLD_SIZE": str(number)}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with tempfile.TemporaryDirectory() as kept:
        out, err = Path(kept) / "out", Path(kept) / "err"
        processes = []
        for rank in range(number):
            own = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if joined else {}
            processes.append(start(words, out, err, folder, environment | own))
        _wait(processes, words, timeout)
        codes = [process.poll() for process in processes]
        failed = [code for code in codes if code]
        texts = [file.read_text(errors="replace") if file.exists() else "" for file in (out, err)]
    return subprocess.CompletedProcess(list(words), failed[0] if failed else 0, *texts)


def _wait(processes: list[Forked], words: Sequence[str], timeout: float) -> None:
    """Until all have ended; a rank that fails leaves the others ten seconds. None runs afterwards."""
    end = time.monotonic() + timeout
    failed = False
    try:
        while any(process.poll() is None for process in processes):
            if not failed and any(process.poll() for process in processes):
                failed, end = True, time.monotonic() + 10
            if time.monotonic() > end:
                if failed:
                    break
                raise subprocess.TimeoutExpired(list(words), timeout)
            time.sleep(0.02)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _command(words: list[str], out: Path, err: Path, folder: Path, environment: dict[str, str]) -> None:
    """Become `python WORDS`."""
    multiprocessing.current_process().daemon = False  # it may start processes
    for file, stream in ((out, 1), (err, 2)):
        with file.open("ab") as opened:
            os.dup2(opened.fileno(), stream)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    first = Path(words[0]).parent if words[0][0] != "-" else folder  # as an interpreter does
    paths = environment.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:0] = [str(first), *filter(None, paths)]
    importlib.invalidate_caches()
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", "1")))
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        elif words[0] == "-c":
            sys.argv = ["-c", *words[2:]]
            exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv = words
            runpy.run_path(words[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves that out
