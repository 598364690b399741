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

from benchmarks.faults_site import Disk, Site, write_inputs
from benchmarks.process_memory import memory_field
from benchmarks.rollout_service import wait_until_healthy
from rollout.store import Store
from rollout.types import FinishReason
from tests.builders.processes import Forked, free_port, start

POSITIONS, THOUGHTS, SECONDS = 16, 3, 3.0  # of a step
SERVICES = ("service a", "service b")
EVERY = 10.0  # seconds between two readings of the memory
WARM = 0.1  # the part of the run before memory is compared
RESULT = Path(__file__).parent / "results" / "soak.json"


def values(folder: Path, urls: Sequence[str], steps: int) -> dict[str, Any]:
    """The configuration of the run."""
    shared = Site(folder, Disk(folder / "disk")).values(folder / "run", "hf", steps)
    return shared | {
        "sampling": shared["sampling"] | {"thoughts": THOUGHTS},
        "positions_per_step": POSITIONS,
        "optim": {"lr": 1e-5, "warmup_steps": 2},
        "checkpoint": {"every": 200, "keep": 2},
        "eval": {"data": str(folder / "corpus" / "held_out.jsonl"), "documents": 8, "every": 500},
        "baseline": {},
        "engine": {"name": "vllm_server", "urls": list(urls), "block_size": 32, "max_staleness": 1},
    }


def serve(folder: Path, name: str, kind: str, port: int) -> Forked:
    """`rlpretrain serve`."""
    words = ["-m", "rlpretrain.cli", "serve", str(folder / "base"), "--engine", kind, "--port", str(port)]
    words += ["--weights-dir", str(folder / "run" / "weights")]
    words += ["--kv-cache-gib", "0.1"] if kind == "vllm" else []
    return start(words, folder / f"{name}.log")


@contextmanager
def running(folder: Path, kind: str, steps: int) -> Iterator[tuple[dict[str, Forked], list[str]]]:
    """The trainer and the services, by name, and the addresses of the services."""
    write_inputs(folder)
    (folder / "pace").write_text(str(SECONDS))
    (folder / "run" / "weights").mkdir(parents=True)
    with ExitStack() as stack:
        processes, ports = {}, [free_port(), free_port()]
        for name, port in zip(SERVICES, ports, strict=True):
            processes[name] = serve(folder, name, kind, port)
            stack.callback(processes[name].kill)
        for process, port in zip(list(processes.values()), ports, strict=True):
            wait_until_healthy(port, process)
        urls = [f"http://127.0.0.1:{port}" for port in ports]
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
