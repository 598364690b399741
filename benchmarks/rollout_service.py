"""Tokens/s of `rlpretrain serve` against vLLM offline and vLLM's own server, on the same requests."""

from __future__ import annotations

import asyncio
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch

from benchmarks.rollout_setup import LONGEST, VOCABULARY, make_model
from rollout import Prompt, SamplingParams
from rollout.vllm_routes import completion
from tests.builders.servers import free_port
from tests.builders.tiny import word_tokenizer

CLIENTS, THOUGHTS, CONTEXT, THOUGHT_TOKENS = 32, 8, 64, 32
VLLM_OPTIONS = {
    "dtype": "float32",
    "max_model_len": LONGEST,
    "max_num_seqs": 256,
    "block_size": 32,
    "logprobs_mode": "processed_logprobs",
    "generation_config": "vllm",
    "kv_cache_memory_bytes": 2 << 30,
}
OFFLINE = """
import sys, time
from benchmarks.rollout_service import VLLM_OPTIONS, THOUGHTS, THOUGHT_TOKENS, make_requests
if __name__ == "__main__":
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt
    switches = {"skip_tokenizer_init": True, "enforce_eager": True, "enable_prefix_caching": True,
                "enable_chunked_prefill": False, "disable_log_stats": True}
    llm = LLM(model=sys.argv[1], seed=0, distributed_executor_backend="uni", **switches, **VLLM_OPTIONS)
    for line in sys.stdin:
        begin = time.perf_counter()
        requests = make_requests()
        prompts = [TokensPrompt(prompt_token_ids=ids) for ids, _ in requests]
        draw = {"n": THOUGHTS, "max_tokens": THOUGHT_TOKENS, "logprobs": 0, "ignore_eos": True,
                "detokenize": False}
        params = [SamplingParams(seed=seed, **draw) for _, seed in requests]
        results = llm.generate(prompts, params, use_tqdm=False)
        tokens = sum(len(output.token_ids) for result in results for output in result.outputs)
        print("DONE", tokens / (time.perf_counter() - begin), flush=True)
        llm.reset_prefix_cache()
"""
"""The offline engine: for each line on its standard input it serves all requests and prints tokens/s."""


def make_requests() -> list[tuple[list[int], int]]:
    """(prompt, seed) of the request of every client."""
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randint(VOCABULARY, (CONTEXT,), generator=generator).tolist(), seed) for seed in range(CLIENTS)
    ]


@dataclass(frozen=True)
class Contender:
    """A process that samples, and how its speed is measured in tokens/s."""

    process: subprocess.Popen[Any]
    measure: Callable[[], float]


def service(rounds: int = 5) -> dict[str, Any]:
    """Tokens/s of the three, in turns; every round starts with an empty prefix cache."""
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder))
        word_tokenizer(f"w{i}" for i in range(VOCABULARY - 3)).save_pretrained(folder)
        with start_contenders(folder) as contenders:
            speeds: dict[str, list[float]] = {name: [] for name in contenders}
            for turn in range(rounds + 1):
                for name, contender in contenders.items():
                    stop_others(contender, contenders.values())
                    speed = contender.measure()
                    if turn:  # the first round warms up
                        speeds[name].append(speed)
    ratios = {}
    for other in ("offline", "vllm_server"):
        pairs = zip(speeds["service"], speeds[other], strict=True)
        ratios[f"over_{other}"] = statistics.median(ours / theirs for ours, theirs in pairs)
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    return ratios | {"tokens_per_s": medians, "rounds": rounds}


@contextmanager
def start_contenders(folder: str) -> Iterator[dict[str, Contender]]:
    """The three processes, ready; killed at the end."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_SERVER_DEV_MODE": "1",
    }
    our_port, their_port = free_port(), free_port()
    offline = subprocess.Popen(
        [sys.executable, "-c", OFFLINE, folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        start_new_session=True,
    )
    commands = [our_command(folder, our_port), vllm_command(folder, their_port)]
    ours, theirs = (
        subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)
        for command in commands
    )
    try:
        for port, process in ((our_port, ours), (their_port, theirs)):
            wait_until_healthy(port, process)
        yield {
            "offline": Contender(offline, lambda: measure_offline(offline)),
            "service": Contender(ours, lambda: asyncio.run(measure_http(our_port, "/rollout"))),
            "vllm_server": Contender(
                theirs, lambda: asyncio.run(measure_http(their_port, "/v1/completions", folder))
            ),
        }
    finally:
        for process in (offline, ours, theirs):
            os.killpg(process.pid, signal.SIGKILL)


def our_command(folder: str, port: int) -> list[str]:
    """`rlpretrain serve`."""
    options = f"--port {port} --max-model-len {LONGEST} --kv-cache-gib 2 --batch-size 256"
    return [sys.executable, "-m", "rlpretrain.cli", "serve", folder, *options.split()]


def vllm_command(folder: str, port: int) -> list[str]:
    """vLLM's own server."""
    options = [f"--port={port}", "--enforce-eager", "--no-enable-chunked-prefill"]
    options += [f"--{name.replace('_', '-')}={value}" for name, value in VLLM_OPTIONS.items()]
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, *options]


def stop_others(contender: Contender, contenders: Iterable[Contender]) -> None:
    """Let one process run and the others stand still: an idle vLLM server takes a large part of a core."""
    for other in contenders:
        os.killpg(other.process.pid, signal.SIGCONT if other is contender else signal.SIGSTOP)


def wait_until_healthy(port: int, process: Any) -> None:
    """Wait up to five minutes for the server of a process; raises httpx.TransportError if it ends."""
    deadline = time.monotonic() + 300
    while True:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                return
        except httpx.TransportError:
            if time.monotonic() > deadline or process.poll() is not None:
                raise
        time.sleep(0.5)


def measure_offline(process: subprocess.Popen[str]) -> float:
    """Tokens/s of one round of the offline engine."""
    assert process.stdin and process.stdout
    process.stdin.write("go\n")
    process.stdin.flush()
    while not (line := process.stdout.readline()).startswith("DONE"):
        pass
    return float(line.split()[1])


async def measure_http(port: int, route: str, model: str | None = None) -> float:
    """Tokens/s of all clients together; `model` is the name that vLLM's server wants in a request."""
    limits = httpx.Limits(max_connections=CLIENTS)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=600, limits=limits) as client:

        async def sample(ids: list[int], seed: int) -> int:
            if model is None:
                body: dict[str, Any] = {
                    "prompts": [{"token_ids": ids}],
                    "params": {"max_thought_tokens": THOUGHT_TOKENS},
                    "n": THOUGHTS,
                    "seeds": [seed],
                }
                answer = (await client.post(route, json=body)).raise_for_status().json()
                return sum(len(thought["token_ids"]) for thought in answer["groups"][0]["thoughts"])
            params = SamplingParams(max_thought_tokens=THOUGHT_TOKENS)
            body = completion(model, Prompt(tuple(ids), stop_ids=()), params, THOUGHTS, seed)
            answer = (await client.post(route, json=body)).raise_for_status().json()
            return sum(len(choice["token_ids"]) for choice in answer["choices"])

        begin = time.perf_counter()
        tokens = sum(await asyncio.gather(*(sample(ids, seed) for ids, seed in make_requests())))
        speed = tokens / (time.perf_counter() - begin)
        await client.post("/reset_prefix_cache")
        return speed
