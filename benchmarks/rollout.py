"""Speed of the rollout service over HTTP, of sampling ahead of the trainer, of a weight sync and its probe.

    python -m benchmarks.rollout [service async sync probe] [--json]

- service: tokens/s of `rlpretrain serve` with 32 clients, over vLLM's offline engine, and over vLLM's own
  server, same requests.
- async: step time with max_staleness 1 over the longer of rollout and training, with thoughts from another
  machine and from this one.
- sync: in-process weight sync over a copy of the state dict, and vLLM's packing of its linear layers alone.
- probe: the probe's share of a step, hidden 512, a hundred positions.

Every part alternates between the things it compares and reports the median of their ratios. It needs vLLM
and Ray.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch

from rlpretrain.corpora import dial
from rlpretrain.objectives import rlp
from rollout import FinishReason, Group, Prompt, SamplingParams, Thought
from rollout.vllm_routes import completion
from tests.builders.servers import free_port
from tests.builders.tiny import word_tokenizer

VOCABULARY, LONGEST = 8192, 512
SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": LONGEST,
    "tie_word_embeddings": True,
}
CLIENTS, REQUESTS, N, CONTEXT, TOKENS = 32, 1, 8, 64, 32
FLAGS = {
    "dtype": "float32",
    "max_model_len": LONGEST,
    "max_num_seqs": 256,
    "block_size": 32,
    "logprobs_mode": "processed_logprobs",
    "generation_config": "vllm",
    "kv_cache_memory_bytes": 2 << 30,
}


def make_model(folder: Path, **changes: Any) -> Any:
    """A random model, saved."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("qwen3", vocab_size=VOCABULARY, **SHAPE | changes)
    )
    model.eval().save_pretrained(folder)
    return model


def requests() -> list[tuple[list[int], int]]:
    """(prompt, seed) of every request."""
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randint(VOCABULARY, (CONTEXT,), generator=generator).tolist(), k)
        for k in range(CLIENTS * REQUESTS)
    ]


# service


OFFLINE = """
import json, sys, time
from benchmarks.rollout import FLAGS, N, TOKENS, requests
if __name__ == "__main__":
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt
    switches = {"skip_tokenizer_init": True, "enforce_eager": True, "enable_prefix_caching": True,
                "enable_chunked_prefill": False, "disable_log_stats": True}
    llm = LLM(model=sys.argv[1], seed=0, distributed_executor_backend="uni", **switches, **FLAGS)
    for line in sys.stdin:
        begin = time.perf_counter()
        prompts = [TokensPrompt(prompt_token_ids=ids) for ids, _ in requests()]
        draw = {"n": N, "max_tokens": TOKENS, "logprobs": 0, "ignore_eos": True, "detokenize": False}
        params = [SamplingParams(seed=seed, **draw) for _, seed in requests()]
        found = llm.generate(prompts, params, use_tqdm=False)
        tokens = sum(len(o.token_ids) for r in found for o in r.outputs)
        print("DONE", tokens / (time.perf_counter() - begin), flush=True)
        llm.reset_prefix_cache()
"""


def service(rounds: int = 5) -> dict[str, Any]:
    """Tokens/s of the three, in turns; every round starts with an empty prefix cache."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_SERVER_DEV_MODE": "1",
    }
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder))
        word_tokenizer(f"w{i}" for i in range(VOCABULARY - 3)).save_pretrained(folder)
        ours, theirs = free_port(), free_port()
        flags = [x for k, v in FLAGS.items() for x in (f"--{k.replace('_', '-')}", str(v))]
        alone = subprocess.Popen(
            [sys.executable, "-c", OFFLINE, folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
            start_new_session=True,
        )
        servers = [
            subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "rlpretrain.cli",
                    "serve",
                    folder,
                    "--port",
                    str(ours),
                    "--max-model-len",
                    str(LONGEST),
                    "--kv-cache-gib",
                    "2",
                    "--batch-size",
                    "256",
                ],
                env=environment,
                stdout=subprocess.DEVNULL,
                start_new_session=True,
            ),
            subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "vllm.entrypoints.openai.api_server",
                    "--model",
                    folder,
                    "--port",
                    str(theirs),
                    "--enforce-eager",
                    "--no-enable-chunked-prefill",
                    *flags,
                ],
                env=environment,
                stdout=subprocess.DEVNULL,
                start_new_session=True,
            ),
        ]
        found: dict[str, list[float]] = {"offline": [], "service": [], "vllm_server": []}
        try:
            for port in (ours, theirs):
                _wait(port)
            kinds = {
                "offline": (alone, lambda: _offline(alone)),
                "service": (servers[0], lambda: asyncio.run(_over_http(ours, "/rollout"))),
                "vllm_server": (
                    servers[1],
                    lambda: asyncio.run(_over_http(theirs, "/v1/completions", folder)),
                ),
            }
            for turn in range(rounds + 1):
                for name, (process, measured) in kinds.items():
                    _only(process, (alone, *servers))
                    speed = measured()
                    found[name] += [speed] if turn else []  # the first warms up
        finally:
            for process in (alone, *servers):
                os.killpg(process.pid, signal.SIGKILL)
    ratios = {
        f"over_{other}": statistics.median(a / b for a, b in zip(found["service"], found[other], strict=True))
        for other in ("offline", "vllm_server")
    }
    return ratios | {
        "tokens_per_s": {name: statistics.median(speeds) for name, speeds in found.items()},
        "rounds": rounds,
    }


def _only(process: subprocess.Popen[Any], all_of_them: Sequence[subprocess.Popen[Any]]) -> None:
    """Let the others stand still: an idle vLLM server takes a good part of a core."""
    for other in all_of_them:
        os.killpg(other.pid, signal.SIGCONT if other is process else signal.SIGSTOP)


def _wait(port: int) -> None:
    end = time.monotonic() + 300
    while True:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                return
        except httpx.TransportError:
            if time.monotonic() > end:
                raise
        time.sleep(0.5)


def _offline(process: subprocess.Popen[str]) -> float:
    assert process.stdin and process.stdout
    process.stdin.write("go\n")
    process.stdin.flush()
    while not (line := process.stdout.readline()).startswith("DONE"):
        pass
    return float(line.split()[1])


async def _over_http(port: int, route: str, model: str | None = None) -> float:
    """Tokens/s of all clients together."""
    queue = requests()
    limits = httpx.Limits(max_connections=CLIENTS)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=600, limits=limits) as client:

        async def one(mine: list[tuple[list[int], int]]) -> int:
            tokens = 0
            for ids, seed in mine:
                if model is None:
                    body = {
                        "prompts": [{"token_ids": ids}],
                        "params": {"max_thought_tokens": TOKENS},
                        "n": N,
                        "seeds": [seed],
                    }
                    answer = (await client.post(route, json=body)).raise_for_status().json()
                    tokens += sum(len(t["token_ids"]) for t in answer["groups"][0]["thoughts"])
                else:
                    params = SamplingParams(max_thought_tokens=TOKENS)
                    body = completion(model, Prompt(tuple(ids), stop_ids=()), params, N, seed)
                    answer = (await client.post(route, json=body)).raise_for_status().json()
                    tokens += sum(len(c["token_ids"]) for c in answer["choices"])
            return tokens

        begin = time.perf_counter()
        tokens = sum(await asyncio.gather(*(one(queue[k::CLIENTS]) for k in range(CLIENTS))))
        speed = tokens / (time.perf_counter() - begin)
        await client.post("/reset_prefix_cache")
        return speed


# async


@dataclass(kw_only=True)
class Config(rlp.Config):
    """RLP's fields, and how long a rollout takes."""

    seconds: float = 0.0


class Elsewhere(rlp.RLP):
    """RLP whose thoughts come from a machine of its own: made up, after a while, at no cost to this one."""

    Config = Config

    async def rollout(self, engine: Any, positions: Any, seeds: Any) -> list[Group]:
        """Random thoughts of 24 tokens."""
        version = engine.version
        await asyncio.sleep(self.config.seconds)
        groups = []
        for position, seed in zip(positions, seeds, strict=True):
            words = random.Random(seed)
            thoughts = tuple(
                Thought(tuple(words.choices(range(30), k=24)), (-3.4,) * 24, FinishReason.LENGTH, version, g)
                for g in range(self.setting.thoughts)
            )
            groups.append(
                Group(
                    f"{position.document_id}@{position.index}",
                    position,
                    self.prompt(position),
                    thoughts,
                    version,
                )
            )
        return groups


def asynchronous(steps: int = 14) -> dict[str, Any]:
    """Median step with max_staleness 1 over the longer of rollout and training: with rollouts on another
    machine that take about as long as training, and with a vLLM actor on this one, where the two compete for
    its cores.
    """
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shape = {
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
        }
        make_model(folder / "base", **shape)
        dial.write(folder / "data", base=10, train=2000, held_out=10, seed=0)
        dial.tokenizer().save_pretrained(folder / "base")
        before = _paced(folder, "before", steps, {"name": "hf"}, 0.3)
        same = before["step_time"] - before["perf/rollout_s"]
        apart = {
            kind: _paced(
                folder, f"apart-{kind}", steps, {"name": "hf", "max_staleness": ahead, "in_flight": 1}, same
            )
            for kind, ahead in (("synchronous", 0), ("asynchronous", 1))
        }
        actor = {"name": "ray", "of": "vllm_local", "kv_cache_gib": 0.25, "in_flight": 1}
        here = {
            kind: _paced(folder, f"here-{kind}", steps, actor | {"max_staleness": ahead})
            for kind, ahead in (("synchronous", 0), ("asynchronous", 1))
        }
    return {
        "another_machine": _compared(apart),
        "this_machine": _compared(here),
        "two_processes_at_once": _contention(),
    }


def _paced(
    folder: Path, name: str, steps: int, engine: dict[str, Any], seconds: float | None = None
) -> dict[str, float]:
    """Medians of a run; with `seconds` its rollouts take so long, elsewhere."""
    from rlpretrain import Pretrainer
    from rlpretrain.config.io import build

    far = {} if seconds is None else {"name": "benchmarks.rollout:Elsewhere", "seconds": seconds}
    values = {
        "model": f"{folder}/base",
        "data": {"path": f"{folder}/data/train.jsonl", "max_length": 128},
        "objective": {"name": "rlp", "positions": "after", "marker": "shows"} | far,
        "engine": engine,
        "sampling": {"thoughts": 8, "max_thought_tokens": 24, "cut": "force_close"},
        "positions_per_step": 24,
        "max_steps": steps,
        "threads": 1,
        "console": False,
        "checkpoint": {"every": 0},
        "output_dir": f"{folder}/{name}",
        "baseline": {"frozen_every": 0},
    }
    Pretrainer(build(values)).train()
    rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()][4:]
    names = ("step_time", "perf/rollout_s", "perf/train_s", "perf/sync_s", "perf/probe_s")
    return {k: statistics.median(r.get(k, 0.0) for r in rows) for k in names}


def _compared(found: dict[str, dict[str, float]]) -> dict[str, Any]:
    alone, ahead = found["synchronous"], found["asynchronous"]
    longer = max(alone["perf/rollout_s"], alone["step_time"] - alone["perf/rollout_s"])
    return {
        "step_over_the_longer": ahead["step_time"] / longer,
        "over_synchronous": ahead["step_time"] / alone["step_time"],
        "longer_s": longer,
        **found,
    }


def _contention() -> float:
    """How much longer a process takes on this machine when a second one works beside it."""
    work = (
        "import time, torch; torch.set_num_threads(1); x = torch.randn(512, 512); b = time.perf_counter()\n"
    )
    work += "for _ in range(600): x @ x\nprint(time.perf_counter() - b)"

    def at_once(n: int) -> float:
        running = [
            subprocess.Popen([sys.executable, "-c", work], stdout=subprocess.PIPE, text=True)
            for _ in range(n)
        ]
        return statistics.mean(float(process.communicate()[0]) for process in running)

    return statistics.median(at_once(2) / at_once(1) for _ in range(5))


# sync


def sync(rounds: int = 15) -> dict[str, Any]:
    """Medians of an in-process sync over a copy of the same tensors, and of vLLM's packing alone over that
    copy.
    """
    from rollout.vllm_local import VLLMEngine

    torch.set_num_threads(1)
    found = {}
    for name, changes in {
        "hidden 128": {
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_attention_heads": 4,
            "head_dim": 32,
            "num_key_value_heads": 2,
        },
        "hidden 512": {},
    }.items():
        with tempfile.TemporaryDirectory() as folder:
            model = make_model(Path(folder), **changes)
            engine = VLLMEngine(folder, max_model_len=LONGEST, max_num_seqs=32, kv_cache_gib=0.1)
        named = [(n, p.detach()) for n, p in model.named_parameters(remove_duplicate=False)]
        ratios, packing, seconds = [], [], []
        for version in range(1, rounds + 1):
            begin = time.perf_counter()
            kept = {n: p.clone() for n, p in named}
            copying = time.perf_counter() - begin
            begin = time.perf_counter()
            engine.sync(lambda kept=kept: kept.items(), version)
            seconds.append(time.perf_counter() - begin)
            ratios.append(seconds[-1] / copying)
            packing.append(_pack(kept) / copying)
        engine.close()
        found[name] = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "over_copy": statistics.median(ratios),
            "packing_over_copy": statistics.median(packing),
            "sync_ms": 1e3 * statistics.median(seconds),
        }
    return found


def _pack(state: dict[str, torch.Tensor]) -> float:
    """Seconds that oneDNN takes to pack the matrices, which vLLM's CPU kernels want; a GPU needs none of
    it.
    """
    from vllm import _custom_ops as ops

    matrices = [t for n, t in state.items() if t.ndim == 2 and "embed" not in n]
    begin = time.perf_counter()
    handlers = [ops.create_onednn_mm(t.t(), 32) for t in matrices]
    seconds = time.perf_counter() - begin
    del handlers
    return seconds


# probe


def probe() -> dict[str, Any]:
    """The probe's share of a step: hidden 512, a hundred positions, 8 thoughts of up to 64 tokens."""
    from rlpretrain import Pretrainer
    from rlpretrain.config.io import build

    with tempfile.TemporaryDirectory() as folder:
        paths = dial.write(Path(folder) / "data", base=10, train=600, held_out=10, seed=0)
        make_model(Path(folder) / "base", hidden_size=512)
        dial.tokenizer().save_pretrained(Path(folder) / "base")
        values = {
            "model": f"{folder}/base",
            "data": {"path": str(paths["train"]), "max_length": 128},
            "objective": {"name": "rlp", "positions": "after", "marker": "shows"},
            "sampling": {"thoughts": 8, "max_thought_tokens": 64},
            "engine": {"name": "vllm_local", "kv_cache_gib": 0.5},
            "positions_per_step": 100,
            "max_steps": 4,
            "console": False,
            "checkpoint": {"every": 0},
            "output_dir": f"{folder}/run",
            "baseline": {"frozen_every": 0},
        }
        Pretrainer(build(values)).train()
        rows = [
            json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
        ][1:]
    shares = [r["perf/probe_s"] / r["step_time"] for r in rows]
    return {
        "share": statistics.median(shares),
        "probe_ms": 1e3 * statistics.median(r["perf/probe_s"] for r in rows),
        "step_s": statistics.median(r["step_time"] for r in rows),
    }


PARTS = {"service": service, "async": asynchronous, "sync": sync, "probe": probe}


def main() -> None:
    """Run the parts asked for, each in a process of its own, and print what they found."""
    parser = argparse.ArgumentParser(description="Speed of the rollout service.")
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument(
        "--here", help=argparse.SUPPRESS
    )  # a file: the one part is done in this process, its result goes there
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"there are {', '.join(PARTS)}, not {', '.join(unknown)}")
    if options.here:
        Path(options.here).write_text(json.dumps(PARTS[options.parts[0]]()))
        return
    results = {}
    for part in options.parts or PARTS:
        with tempfile.NamedTemporaryFile(suffix=".json") as result:
            command = [sys.executable, "-m", "benchmarks.rollout", part, "--here", result.name]
            subprocess.run(command, check=True, stdout=sys.stderr, env=os.environ | {"OMP_NUM_THREADS": "1"})
            results[part] = json.loads(Path(result.name).read_text())
        if not options.json:
            print(part, json.dumps(results[part], indent=1), flush=True)
    if options.json:
        print(json.dumps({"benchmark": "rollout", "torch": torch.__version__, "results": results}))


if __name__ == "__main__":
    main()
