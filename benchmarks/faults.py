"""Faults in real training runs: is every group trained exactly once, and does anything hang?

    python -m benchmarks.faults [--injections 20] [--kinds "server killed" "actor killed"] [--json]

A run is the command `rlpretrain train` in a process of its own, on a tiny model, with two vLLM servers, two
Ray actors or the embedded engine. Faults come at random moments (seeded), up to five a run; every other run
samples a step ahead. What became of the groups is read off what a run leaves on disk, and compared with a run
of the same seed without faults. Needs vLLM and Ray, and half an hour of two cores.
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
REQUEST, DEADLINE = (
    5.0,
    240.0,
)  # seconds: for one answer of a server; without any engine, after which a run would stop
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
    """RLP's fields, and where the pace is set."""

    pace: str = ""
    """A file with the seconds that a rollout takes longer: a tiny model's run would be over before a
    server is back.
    """


class Paced(rlp.RLP):
    """RLP with rollouts that take as long as those of a larger model."""

    Config = Config

    async def rollout(self, engine: Any, positions: Any, seeds: Any) -> list[Group]:
        """After a while, the groups."""
        await asyncio.sleep(float(Path(self.config.pace).read_text()))
        return await super().rollout(engine, positions, seeds)


@dataclass
class Site:
    """What runs share: base checkpoint and corpus, two servers, and a proxy before each."""

    folder: Path
    servers: list[VLLMServer] = field(default_factory=list)
    proxies: list[Proxy] = field(default_factory=list)

    def pace(self, seconds: float) -> None:
        """From now on a rollout takes this much longer."""
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
    """Make what runs share, and take it down."""
    dial.write(folder / "corpus", base=10, train=1000, held_out=10)
    tiny_model("qwen3", len(dial.WORDS), **SHAPE).save_pretrained(folder / "base")
    dial.tokenizer().save_pretrained(folder / "base")
    here = Site(folder)
    try:
        if with_servers:
            here.servers += [
                VLLMServer(folder / "base", folder / f"server-{i}.log").start() for i in range(2)
            ]
            here.proxies += [Proxy(server.ready().port) for server in here.servers]
        yield here
    finally:
        for proxy in here.proxies:
            proxy.close()
        for server in here.servers:
            server.kill()


# the faults: each function injects one, waits until it is over, and says whether the run still was there for
# it


def kill_server(here: Site, run: Trainer, rng: random.Random) -> bool:
    """SIGKILL a server and its engine process, and start it again; now and then the other follows before
    it is back.
    """
    while not (working := [s for s in here.servers if answers(s)]):
        time.sleep(0.5)
    server, alone = rng.choice(working), rng.random() < 0.7
    server.kill()
    time.sleep(rng.uniform(0, 3))
    server.start()
    here.pace(6.0)
    while alone and not all(map(answers, here.servers)) and run.alive():  # half a minute at least
        time.sleep(0.5)
    here.pace(0.5)
    return True


def answers(server: VLLMServer) -> bool:
    """Whether a server is there."""
    with contextlib.suppress(OSError), urllib.request.urlopen(f"{server.url}/health", timeout=2):
        return True
    return False


def hang_server(here: Site, run: Trainer, rng: random.Random) -> bool:
    """SIGSTOP a server for longer than a request may take, and until the run went on without it; then it
    wakes up.
    """
    group, before, end = rng.choice(here.servers).process.pid, run.step(), time.monotonic() + 1.5 * DEADLINE
    os.killpg(group, signal.SIGSTOP)
    time.sleep(REQUEST + rng.uniform(0.5, 2))
    while run.step() < before + 3 and run.alive() and time.monotonic() < end:
        time.sleep(0.05)
    os.killpg(group, signal.SIGCONT)
    return True


def slow_server(here: Site, run: Trainer, rng: random.Random) -> bool:
    """Answers that take longer, but not too long."""
    return _through_proxy(here, run, rng, "slow", rng.uniform(0.5, 2))


def reset_connection(here: Site, run: Trainer, rng: random.Random) -> bool:
    """Connections that break in the middle of an answer."""
    return _through_proxy(here, run, rng, "reset", rng.uniform(0, 0.3))


def _through_proxy(here: Site, run: Trainer, rng: random.Random, mode: str, seconds: float) -> bool:
    proxy = rng.choice(here.proxies)
    before, proxy.mode = proxy.hit, mode
    while proxy.hit == before and run.alive():  # until it met an answer
        time.sleep(0.005)
    time.sleep(seconds)
    proxy.mode = "pass"
    return proxy.hit > before


def kill_actor(here: Site, run: Trainer, rng: random.Random) -> bool:
    """SIGKILL a Ray actor, which may be starting again after the last kill; Ray starts it anew."""
    while run.alive():
        with contextlib.suppress(psutil.NoSuchProcess, IndexError):  # none is there, or no more
            tree = psutil.Process(run.process.pid).children(recursive=True)
            rng.choice([p for p in tree if p.name().startswith("ray::Worker")]).kill()
            return True
    return False


def kill_trainer(here: Site, run: Trainer, rng: random.Random) -> bool:
    """SIGKILL the trainer, wherever it is, and resume it."""
    run.kill()
    time.sleep(rng.uniform(0, 0.5))
    run.start("--resume", "auto")
    return True


@dataclass(frozen=True)
class Kind:
    """A kind of fault: how it is injected, into runs with which engine, how long these are, and when it
    comes.
    """

    inject: Callable[[Site, Trainer, random.Random], bool]
    engine: str
    pace: float
    steps: int  # of a run, for each injection
    between: tuple[int, int]  # steps between two injections

    def wait(self, run: Trainer, rng: random.Random) -> None:
        """Until the next injection: some steps, and a part of one; now and then a trainer is killed while
        it starts.
        """
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


def calm(here: Site, engine: str, per_run: int) -> Path:
    """A run without faults, as long as the longest with this engine."""
    folder, steps = (
        here.folder / f"calm-{engine}",
        max(k.steps for k in KINDS.values() if k.engine in (engine, "proxies")),
    )
    here.pace(0.0)
    if not folder.exists() and not Trainer(here.values(folder, engine, steps * per_run)).wait():
        raise SystemExit("the run without faults failed")
    return folder


def measure(name: str, here: Site, injections: int) -> dict[str, Any]:
    """All runs of one kind of fault."""
    kind, per_run, begin = KINDS[name], min(PER_RUN, injections), time.monotonic()
    for server in here.servers:
        server.ready()
    reference = calm(here, "servers" if kind.engine == "proxies" else kind.engine, per_run)
    found, seen, longest, weights, ratios = Counter(), Counter(), 0.0, [0.0], [0.0]
    for i in range(2 * math.ceil(injections / PER_RUN)):
        rng, ahead, folder = (
            random.Random(f"{name} {i}"),
            i % 2,
            here.folder / f"{name}-{i}".replace(" ", "-").replace(",", ""),
        )
        if found["injections"] >= injections:  # later runs only for what did not fit into earlier ones
            break
        here.pace(kind.pace)
        run = Trainer(here.values(folder, kind.engine, kind.steps * per_run, ahead))
        for _ in range(min(PER_RUN, injections - found["injections"])):
            kind.wait(run, rng)
            found["injections"] += run.alive() and kind.inject(here, run, rng)
        finished = run.wait()
        found.update(account(folder, reference, kind.steps * per_run, ahead))
        found.update(runs=1, finished=int(finished), steps=kind.steps * per_run)
        longest = max(longest, run.longest)
        seen["steps_done_again"] += run.done_again
        if finished:
            said = json.loads((folder / "run.json").read_text())["engine"]
            seen.update({k: said[k] for k in COUNTED if k in said})
        if finished and not ahead:
            weights.append(apart(folder, reference, kind.steps * per_run))
            ratios += [row.get("sampling/abs_log_ratio_max", 0.0) for row in rows(folder)]
        print(f"{folder.name}: {dict(found)} {dict(seen)} {run.longest:.1f} s", file=sys.stderr, flush=True)
    return {
        **found,
        "weights_apart": max(weights),
        "log_ratio_max": max(ratios),
        "longest_s": round(longest, 1),
        "deadline_s": DEADLINE,
        "seconds": round(time.monotonic() - begin),
        "counted": +seen,
    }


def fine(r: dict[str, Any]) -> bool:
    """Whether every run ended well and every group was trained once, in its place, or counted as aborted,
    in time.
    """
    return (
        r["finished"] == r["runs"]
        and r["once"] + r["aborted"] == r["expected"]
        and not r["twice"]
        and not r["out_of_place"]
        and r["updates"] == r["steps"]
        and r["longest_s"] <= r["deadline_s"]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Inject, count, and print a table, or with --json one JSON object; exit code 1 if a group or a run
    came to harm.
    """
    parser = argparse.ArgumentParser(description="Faults in real runs.")
    parser.add_argument("--injections", type=int, default=20, help="of each kind")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    options = parser.parse_args(argv)
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    served = any(KINDS[k].engine in ("servers", "proxies") for k in options.kinds)
    with tempfile.TemporaryDirectory(prefix="faults-") as folder, site(Path(folder), served) as here:
        results = {name: measure(name, here, options.injections) for name in options.kinds}
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
