"""A long training run with two rollout services: does its memory stay flat, and is anything lost?

    python -m benchmarks.soak [--minutes 240] [--services hf|vllm] [--json]

`rlpretrain train` and two `rlpretrain serve`, each a process of its own, on a tiny model. A pause in every
rollout sets the pace: a step takes about three seconds. It has 16 requests, and the services get new weights
after it. The result is written to benchmarks/results/soak.json, or to --output, every minute.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import torch
import yaml

from benchmarks.faults_site import SHAPE
from benchmarks.process_memory import memory_field
from rlpretrain.corpora import dial
from rollout.store import Store
from rollout.types import FinishReason
from tests.builders.processes import Forked, free_port, start
from tests.builders.tiny import tiny_model

POSITIONS, THOUGHTS, SECONDS = 16, 3, 3.0  # of a step
EVERY = 10.0  # seconds between two readings of the memory
WARM = 0.1  # the part of the run before memory is compared
RESULT = Path(__file__).parent / "results" / "soak.json"


def values(folder: Path, urls: Sequence[str], steps: int) -> dict[str, Any]:
    """The configuration of the run."""
    return {
        "model": str(folder / "base"),
        "data": {"path": str(folder / "corpus" / "train.jsonl"), "max_length": 64},
        "objective": {
            "name": "benchmarks.faults_site:Paced",
            "positions": "after",
            "marker": "shows",
            "pace": str(folder / "pace"),
        },
        "sampling": {"thoughts": THOUGHTS, "max_thought_tokens": 4, "cut": "force_close"},
        "positions_per_step": POSITIONS,
        "optim": {"lr": 1e-5, "warmup_steps": 2},
        "policy": {"backend": "torch"},
        "max_steps": steps,
        "threads": 1,
        "checkpoint": {"every": 200, "keep": 2},
        "eval": {"data": str(folder / "corpus" / "held_out.jsonl"), "documents": 8, "every": 500},
        "stop": {"collapse": False},
        "console": False,
        "device": "cpu",
        "save_rollouts": True,
        "output_dir": str(folder / "run"),
        "engine": {"name": "vllm_server", "urls": list(urls), "block_size": 32, "max_staleness": 1},
    }


def serve(folder: Path, name: str, kind: str, port: int) -> Forked:
    """`rlpretrain serve`."""
    words = ["-m", "rlpretrain.cli", "serve", str(folder / "base"), "--engine", kind, "--port", str(port)]
    words += ["--weights-dir", str(folder / "run" / "weights")]
    words += ["--kv-cache-gib", "0.1"] if kind == "vllm" else []
    return start(words, folder / f"{name}.log")


def wait_until_healthy(url: str, process: Forked, log: Path) -> None:
    """Wait up to three minutes for a service."""
    end = time.monotonic() + 180
    while True:
        try:
            if httpx.get(f"{url}/health").status_code == 200:
                return
        except httpx.TransportError:
            if time.monotonic() > end or process.poll() is not None:
                raise SystemExit(log.read_text()[-3000:]) from None
        time.sleep(0.3)


@contextmanager
def running(folder: Path, kind: str, steps: int) -> Iterator[tuple[dict[str, Forked], list[str]]]:
    """The trainer and the services, by name, and the addresses of the services."""
    dial.write(folder / "corpus", base=10, train=1000, held_out=10)
    tiny_model("qwen3", len(dial.WORDS), **SHAPE).save_pretrained(folder / "base")
    dial.tokenizer().save_pretrained(folder / "base")
    (folder / "pace").write_text(str(SECONDS))
    (folder / "run" / "weights").mkdir(parents=True)
    with ExitStack() as stack:
        processes, urls = {}, []
        for name in ("service a", "service b"):
            port = free_port()
            processes[name] = serve(folder, name, kind, port)
            stack.callback(processes[name].kill)
            urls.append(f"http://127.0.0.1:{port}")
        for (name, process), url in zip(processes.items(), urls, strict=True):
            wait_until_healthy(url, process, folder / f"{name}.log")
        (folder / "config.yaml").write_text(yaml.safe_dump(values(folder, urls, steps)))
        words = ["-m", "rlpretrain.cli", "train", str(folder / "config.yaml")]
        processes["trainer"] = start(words, folder / "trainer.log")
        stack.callback(processes["trainer"].kill)
        yield processes, urls


def growth(readings: Sequence[tuple[float, float]]) -> dict[str, float]:
    """What became of the memory after the first part of the run: (hours, MiB) of each reading."""
    warm = readings[int(WARM * len(readings)) :]
    if len(warm) < 10:
        return {}
    hours, sizes = zip(*warm, strict=True)
    part = len(warm) // 5
    return {
        "hours": hours[-1],
        "first_mib": statistics.median(sizes[:part]),
        "last_mib": statistics.median(sizes[-part:]),
        "mib_an_hour": statistics.linear_regression(hours, sizes).slope,
    }


def groups_of(folder: Path, steps: int) -> dict[str, int]:
    """What became of the groups that the run stored."""
    store, times, aborted = Store(folder / "rollouts", 0), Counter(), 0
    for step in store.steps():
        for group in store.read(step)[0]:
            times[group.id] += 1
            aborted += any(t.finish_reason is FinishReason.ABORT for t in group.thoughts)
    return {
        "groups": len(times),
        "expected": POSITIONS * steps,
        "twice": sum(n > 1 for n in times.values()),
        "aborted": aborted,
    }


def requests_of(urls: Sequence[str]) -> Counter[str]:
    """How often the services answered, by route and status."""
    counts: Counter[str] = Counter()
    for url in urls:
        for line in httpx.get(f"{url}/metrics", timeout=30).text.splitlines():
            if "requests_total{" in line:
                labels, _, number = line.partition("{")[2].rpartition("} ")
                counts[labels.replace('"', "")] += int(float(number))
    return counts


def soak(minutes: float, kind: str, output: Path) -> dict[str, Any]:
    """Run, and write what was measured every minute."""
    steps = max(1, round(60 * minutes / SECONDS))
    found: dict[str, Any] = {"benchmark": "soak", "torch": torch.__version__, "services": kind}
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        folder = Path(name)
        with running(folder, kind, steps) as (processes, urls):
            readings: dict[str, list[tuple[float, float]]] = {name: [] for name in processes}
            begin, written, trainer = time.monotonic(), 0.0, processes["trainer"]
            while trainer.poll() is None:
                time.sleep(EVERY)
                now = time.monotonic() - begin
                read(processes, readings, now / 3600)
                if now - written > 60 and trainer.poll() is None:
                    written = now
                    found["memory"] = {name: growth(rows) for name, rows in readings.items()}
                    found |= {"minutes": now / 60, "steps": steps_of(folder / "run"), "done": False}
                    found["requests"] = dict(requests_of(urls))
                    output.write_text(json.dumps(found, indent=1))
            found["memory"] = {name: growth(rows) for name, rows in readings.items()}
            found["requests"] = dict(requests_of(urls))
        record = json.loads((folder / "run" / "run.json").read_text())
        done = record["status"] == "done" and record["step"] == record["total_steps"]
        found |= groups_of(folder / "run", record["step"])
        found |= {"minutes": (time.monotonic() - begin) / 60, "steps": record["step"], "done": done}
        found["counted"] = {k: v for k, v in record["engine"].items() if isinstance(v, int)}
        if not done:
            print((folder / "trainer.log").read_text()[-3000:], file=sys.stderr)
    output.write_text(json.dumps(found, indent=1))
    return found


def read(
    processes: Mapping[str, Forked], readings: Mapping[str, list[tuple[float, float]]], hours: float
) -> None:
    """Read the resident memory of every process."""
    for name, process in processes.items():
        with suppress(RuntimeError, OSError):  # it has just ended
            readings[name].append((hours, memory_field("VmRSS", process.pid) / 2**20))


def steps_of(folder: Path) -> int:
    """The steps that the run has logged."""
    file = folder / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def fine(found: Mapping[str, Any]) -> bool:
    """Whether the run is complete, every group is there once, and every request of it was answered."""
    return bool(found["done"] and found["groups"] == found["expected"] and not found["twice"])


def table(found: Mapping[str, Any]) -> str:
    """The result as text."""
    lines = [
        f"{found['minutes']:.0f} minutes, {found['steps']} steps, services of {found['services']}",
        f"groups: {found['groups']} of {found['expected']}, "
        f"{found['twice']} twice, {found['aborted']} aborted",
        "",
        "| process | MiB at first | at last | MiB an hour |",
        "|---|---|---|---|",
    ]
    for name, row in found["memory"].items():
        if row:
            numbers = (row["first_mib"], row["last_mib"], row["mib_an_hour"])
            lines.append(f"| {name} | " + " | ".join(f"{number:.1f}" for number in numbers) + " |")
    answers = sorted(found["requests"].items())
    return "\n".join([*lines, "", *(f"{labels}: {number}" for labels, number in answers)])


def main(argv: Sequence[str] | None = None) -> int:
    """Run and print; exit code 1 if the run failed or a group was not trained once."""
    parser = argparse.ArgumentParser(description="A long training run with two rollout services.")
    parser.add_argument("--minutes", type=float, default=240.0)
    parser.add_argument("--services", choices=("hf", "vllm"), default="hf", help="their engine")
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    options = parser.parse_args(argv)
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    found = soak(options.minutes, options.services, options.output)
    print(json.dumps(found) if options.json else table(found))
    return 0 if fine(found) else 1


if __name__ == "__main__":
    sys.exit(main())
