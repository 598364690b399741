"""Faults in real training runs: is every group trained exactly once, and does anything hang?

    python -m benchmarks.faults [--injections 20] [--kinds "server killed" "actor killed"] [--json]

A run is the command `rlpretrain train` in a process of its own, on a tiny model, with two vLLM servers, two
Ray actors or the embedded engine. Faults come at random moments (seeded), up to five a run; every other run
samples a step ahead. The files that a run leaves show what happened to its groups; they are compared with a
run of the same seed without faults. Needs vLLM and Ray, and half an hour of two cores.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import random
import signal
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from rlpretrain.corpora import dial
from rlpretrain.objectives import rlp
from rollout.types import Group
from tests.builders.servers import Proxy, VLLMServer
from tests.builders.tiny import tiny_model
from tests.builders.trainers import Trainer, account, apart, rows

SHAPE = {
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "initializer_range": 0.1,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
PER_RUN = 5  # injections in a run
REQUEST = 5.0  # seconds for one answer of a server
DEADLINE = 240.0  # seconds without any engine after which a run would stop
COUNTED = (
    "retries",
    "server_failures",
    "servers_taken_back",
    "resampled_prompts",
    "actor_deaths",
    "actors_taken_back",
    "missed_syncs",
)


@dataclass(kw_only=True)
class Config(rlp.Config):
    """RLP's fields, and the file that sets the pace."""

    pace: str = ""
    """A file with the seconds added to a rollout: otherwise a tiny model's run ends before a server is
    back.
    """


class Paced(rlp.RLP):
    """RLP with rollouts as slow as those of a larger model."""

    Config = Config

    async def rollout(self, engine: Any, positions: Any, seeds: Any) -> list[Group]:
        """The groups, after the pause."""
        await asyncio.sleep(float(Path(self.config.pace).read_text()))
        return await super().rollout(engine, positions, seeds)


@dataclass
class Site:
    """What runs share: base checkpoint and corpus, two servers, and a proxy in front of each."""

    folder: Path
    servers: list[VLLMServer] = field(default_factory=list)
    proxies: list[Proxy] = field(default_factory=list)

    def pace(self, seconds: float) -> None:
        """Add this pause to every rollout from now on."""
        (self.folder / ".pace").write_text(str(seconds))
        (self.folder / ".pace").replace(self.folder / "pace")

    def values(self, output_dir: Path, engine: str, steps: int, ahead: int = 0) -> dict[str, Any]:
        """The configuration of a run."""
        urls = [s.url for s in (self.proxies if engine == "proxies" else self.servers)]
        engines = {
            "hf": {"name": "hf"},
            "ray": {"name": "ray", "of": "hf", "num_engines": 2, "request_timeout": 60.0},
        }
        servers = {"name": "vllm_server", "urls": urls, "request_timeout": REQUEST, "block_size": 32}
        return {
            "model": str(self.folder / "base"),
            "data": {"path": str(self.folder / "corpus" / "train.jsonl"), "max_length": 64},
            "objective": {
                "name": "benchmarks.faults:Paced",
                "positions": "after",
                "marker": "shows",
                "pace": str(self.folder / "pace"),
            },
            "sampling": {"thoughts": 3, "max_thought_tokens": 4, "cut": "force_close"},
            "positions_per_step": 4,
            "optim": {"lr": 1e-3, "warmup_steps": 2},
            "policy": {"backend": "torch"},
            "max_steps": steps,
            "threads": 1,
            "checkpoint": {"every": 5, "keep": 1000},
            "stop": {"collapse": False},
            "baseline": {"frozen_every": 0},
            "console": False,
            "device": "cpu",
            "save_rollouts": True,
            "output_dir": str(output_dir),
            "engine": engines.get(engine, servers)
            | ({} if engine == "hf" else {"deadline": DEADLINE})
            | {"max_staleness": ahead, "in_flight": 2},
        }


@contextlib.contextmanager
def site(folder: Path, with_servers: bool) -> Iterator[Site]:
    """Set up what runs share, and close it at the end."""
    dial.write(folder / "corpus", base=10, train=1000, held_out=10)
    tiny_model("qwen3", len(dial.WORDS), **SHAPE).save_pretrained(folder / "base")
    dial.tokenizer().save_pretrained(folder / "base")
    shared = Site(folder)
    try:
        if with_servers:
            shared.servers += [
                VLLMServer(folder / "base", folder / f"server-{i}.log").start() for i in range(2)
            ]
            shared.proxies += [Proxy(server.ready().port) for server in shared.servers]
        yield shared
    finally:
        for proxy in shared.proxies:
            proxy.close()
        for server in shared.servers:
            server.kill()


# The faults: each function injects one, waits until it is over, and returns whether the run was alive for it.


def kill_server(shared: Site, run: Trainer, rng: random.Random) -> bool:
    """SIGKILL a server and its engine process, and start it again.

    In three of ten cases it does not wait until both servers are back, so the other may follow.
    """
    while not (working := [s for s in shared.servers if answers(s)]):
        time.sleep(0.5)
    server, alone = rng.choice(working), rng.random() < 0.7
    server.kill()
    time.sleep(rng.uniform(0, 3))
    server.start()
    shared.pace(6.0)
    while alone and not all(map(answers, shared.servers)) and run.alive():  # half a minute at least
        time.sleep(0.5)
    shared.pace(0.5)
    return True


def answers(server: VLLMServer) -> bool:
    """Whether a server answers."""
    with contextlib.suppress(OSError), urllib.request.urlopen(f"{server.url}/health", timeout=2):
        return True
    return False


def hang_server(shared: Site, run: Trainer, rng: random.Random) -> bool:
    """SIGSTOP a server for longer than a request may take, until the run goes on; then wake it."""
    group, before, end = rng.choice(shared.servers).process.pid, run.step(), time.monotonic() + 1.5 * DEADLINE
    os.killpg(group, signal.SIGSTOP)
    time.sleep(REQUEST + rng.uniform(0.5, 2))
    while run.step() < before + 3 and run.alive() and time.monotonic() < end:
        time.sleep(0.05)
    os.killpg(group, signal.SIGCONT)
    return True


def slow_server(shared: Site, run: Trainer, rng: random.Random) -> bool:
    """Slow down answers, but stay within the time limit."""
    return _through_proxy(shared, run, rng, "slow", rng.uniform(0.5, 2))


def reset_connection(shared: Site, run: Trainer, rng: random.Random) -> bool:
    """Break connections in the middle of an answer."""
    return _through_proxy(shared, run, rng, "reset", rng.uniform(0, 0.3))


def _through_proxy(shared: Site, run: Trainer, rng: random.Random, mode: str, seconds: float) -> bool:
    proxy = rng.choice(shared.proxies)
    before, proxy.mode = proxy.hit, mode
    while proxy.hit == before and run.alive():  # until it affected an answer
        time.sleep(0.005)
    time.sleep(seconds)
    proxy.mode = "pass"
    return proxy.hit > before


def kill_actor(shared: Site, run: Trainer, rng: random.Random) -> bool:
    """SIGKILL a Ray actor, which may still be restarting after the last kill; Ray restarts it."""
    while run.alive():
        with contextlib.suppress(psutil.NoSuchProcess, IndexError):  # no actor exists, or it has just ended
            tree = psutil.Process(run.process.pid).children(recursive=True)
            rng.choice([p for p in tree if p.name().startswith("ray::Worker")]).kill()
            return True
    return False


def kill_trainer(shared: Site, run: Trainer, rng: random.Random) -> bool:
    """SIGKILL the trainer at any point, and resume it."""
    run.kill()
    time.sleep(rng.uniform(0, 0.5))
    run.start("--resume", "auto")
    return True


@dataclass(frozen=True)
class Kind:
    """A kind of fault: how it is injected, the engine and length of its runs, and its timing."""

    inject: Callable[[Site, Trainer, random.Random], bool]
    engine: str
    pace: float
    steps: int  # of a run, for each injection
    between: tuple[int, int]  # steps between two injections

    def wait(self, run: Trainer, rng: random.Random) -> None:
        """Wait some steps and a part of one; in a quarter of the cases a trainer is killed at its start."""
        before, more = run.step(), rng.randint(*self.between)
        if self.inject is kill_trainer and rng.random() < 0.25:
            more = 0
        while run.step() < before + more and run.alive():
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.4 + self.pace))


KINDS = {
    "server killed": Kind(kill_server, "servers", 0.5, 16, (1, 6)),
    "server hung": Kind(hang_server, "servers", 0.2, 15, (1, 5)),
    "server slow": Kind(slow_server, "proxies", 0.05, 10, (1, 4)),
    "connection reset": Kind(reset_connection, "proxies", 0.05, 10, (1, 6)),
    "actor killed": Kind(kill_actor, "ray", 0.3, 10, (1, 6)),
    "trainer killed, embedded engine": Kind(kill_trainer, "hf", 0.05, 10, (1, 6)),
    "trainer killed, servers": Kind(kill_trainer, "servers", 0.05, 10, (1, 6)),
}


def run_without_faults(shared: Site, engine: str, per_run: int) -> Path:
    """The folder of a run without faults, as long as the longest run with this engine."""
    folder = shared.folder / f"calm-{engine}"
    steps = max(k.steps for k in KINDS.values() if k.engine in (engine, "proxies"))
    shared.pace(0.0)
    if not folder.exists() and not Trainer(shared.values(folder, engine, steps * per_run)).wait():
        raise SystemExit("the run without faults failed")
    return folder


def measure(name: str, shared: Site, injections: int) -> dict[str, Any]:
    """All runs of one kind of fault."""
    kind, per_run, begin = KINDS[name], min(PER_RUN, injections), time.monotonic()
    for server in shared.servers:
        server.ready()
    reference = run_without_faults(shared, "servers" if kind.engine == "proxies" else kind.engine, per_run)
    counts, engine_counts = Counter(), Counter()
    longest, weights, ratios = 0.0, [0.0], [0.0]
    for i in range(2 * math.ceil(injections / PER_RUN)):
        rng, ahead = random.Random(f"{name} {i}"), i % 2
        folder = shared.folder / f"{name}-{i}".replace(" ", "-").replace(",", "")
        if counts["injections"] >= injections:  # later runs only for injections that are still missing
            break
        shared.pace(kind.pace)
        run = Trainer(shared.values(folder, kind.engine, kind.steps * per_run, ahead))
        for _ in range(min(PER_RUN, injections - counts["injections"])):
            kind.wait(run, rng)
            counts["injections"] += run.alive() and kind.inject(shared, run, rng)
        finished = run.wait()
        counts.update(account(folder, reference, kind.steps * per_run, ahead))
        counts.update(runs=1, finished=int(finished), steps=kind.steps * per_run)
        longest = max(longest, run.longest)
        engine_counts["steps_done_again"] += run.done_again
        if finished:
            counters = json.loads((folder / "run.json").read_text())["engine"]
            engine_counts.update({k: counters[k] for k in COUNTED if k in counters})
        if finished and not ahead:
            weights.append(apart(folder, reference, kind.steps * per_run))
            ratios += [row.get("sampling/abs_log_ratio_max", 0.0) for row in rows(folder)]
        print(
            f"{folder.name}: {dict(counts)} {dict(engine_counts)} {run.longest:.1f} s",
            file=sys.stderr,
            flush=True,
        )
    return {
        **counts,
        "weights_apart": max(weights),
        "log_ratio_max": max(ratios),
        "longest_s": round(longest, 1),
        "deadline_s": DEADLINE,
        "seconds": round(time.monotonic() - begin),
        "counted": +engine_counts,
    }


def fine(r: dict[str, Any]) -> bool:
    """Whether every run ended well, in time, and trained or aborted every group once and in its place."""
    return (
        r["finished"] == r["runs"]
        and r["once"] + r["aborted"] == r["expected"]
        and not r["twice"]
        and not r["out_of_place"]
        and r["updates"] == r["steps"]
        and r["longest_s"] <= r["deadline_s"]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Inject, count and print; exit code 1 if a run failed or a group was not trained once."""
    parser = argparse.ArgumentParser(description="Faults in real runs.")
    parser.add_argument("--injections", type=int, default=20, help="of each kind")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    options = parser.parse_args(argv)
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    served = any(KINDS[k].engine in ("servers", "proxies") for k in options.kinds)
    with tempfile.TemporaryDirectory(prefix="faults-") as folder, site(Path(folder), served) as shared:
        results = {name: measure(name, shared, options.injections) for name in options.kinds}
    good = all(map(fine, results.values()))
    print(
        json.dumps({"benchmark": "faults", "torch": torch.__version__, "fine": good, "results": results})
        if options.json
        else table(results)
    )
    return 0 if good else 1


def table(results: dict[str, Any]) -> str:
    """The counts as a table."""
    columns = (
        "injections",
        "runs",
        "finished",
        "expected",
        "once",
        "twice",
        "lost",
        "aborted",
        "other_thoughts",
        "weights_apart",
        "longest_s",
        "deadline_s",
        "counted",
    )
    lines = ["| fault | " + " | ".join(columns).replace("_", " ") + " |", "|---" * (len(columns) + 1) + "|"]
    for name, r in results.items():
        counted = ", ".join(f"{k.replace('_', ' ')} {n}" for k, n in r["counted"].items())
        shown = r | {"weights_apart": f"{r['weights_apart']:.1g}", "counted": counted}
        lines.append(f"| {name} | " + " | ".join(str(shown.get(c, 0)) for c in columns) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
