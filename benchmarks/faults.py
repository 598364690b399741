"""Faults in real training runs: is every group trained exactly once, and does anything hang?

    python -m benchmarks.faults [--injections 20] [--kinds "server killed" "actor killed"] [--json]

A run is the command `rlpretrain train` in a process of its own, on a tiny model, with two vLLM servers, two
Ray actors or the embedded engine. Faults come at random moments (seeded), up to five a run; every other run
samples a step ahead. The files that a run leaves show what happened to its groups; they are compared with a
run of the same seed without faults. Needs vLLM and Ray, and half an hour of two cores.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.faults_kinds import KINDS, Kind
from benchmarks.faults_site import DEADLINE, Site, site
from tests.builders.trainers import Trainer, account, apart, rows

PER_RUN = 5  # injections in a run
COUNTED = (
    "retries",
    "server_failures",
    "servers_taken_back",
    "resampled_prompts",
    "actor_deaths",
    "actors_taken_back",
    "missed_syncs",
)


def run_without_faults(shared: Site, kind: Kind, per_run: int) -> Path:
    """The folder of a run without faults, as long as the longest run like those of this kind."""
    folder = shared.folder / kind.calm
    steps = max(k.steps for k in KINDS.values() if k.calm == kind.calm)
    shared.pace(0.0)
    engine = "servers" if kind.engine == "proxies" else kind.engine
    values = shared.values(folder, engine, steps * per_run, policy=kind.policy)
    if not folder.exists() and not Trainer(values, ranks=kind.ranks).wait():
        raise SystemExit("the run without faults failed")
    return folder


def measure(name: str, shared: Site, injections: int) -> dict[str, Any]:
    """All runs of one kind of fault."""
    kind, per_run, begin = KINDS[name], min(PER_RUN, injections), time.monotonic()
    for server in shared.servers:
        server.ready()
    reference = run_without_faults(shared, kind, per_run)
    place = shared.disk.make() if kind.on_disk else shared.folder
    counts, engine_counts = Counter(), Counter()
    longest, weights, ratios = 0.0, [0.0], [0.0]
    for i in range(2 * math.ceil(injections / PER_RUN)):
        rng, ahead = random.Random(f"{name} {i}"), i % 2
        folder = place / f"{name}-{i}".replace(" ", "-").replace(",", "")
        if counts["injections"] >= injections:  # later runs only for injections that are still missing
            break
        shared.pace(kind.pace)
        values = shared.values(folder, kind.engine, kind.steps * per_run, ahead, kind.policy)
        run = Trainer(values, ranks=kind.ranks, log=shared.folder / f"{folder.name}.log")
        for _ in range(min(PER_RUN, injections - counts["injections"])):
            kind.wait(run, rng)
            counts["injections"] += run.alive() and kind.inject(shared, run, rng)
        finished = run.wait()
        counts.update(account(folder, reference, kind.steps * per_run, ahead, kind.ranks))
        counts.update(runs=1, finished=int(finished), steps=kind.steps * per_run)
        longest = max(longest, run.longest)
        engine_counts.update(steps_done_again=run.done_again, others_killed=run.hung, named=run.named)
        if finished:
            counters = json.loads((folder / "run.json").read_text())["engine"]
            engine_counts.update({k: counters[k] for k in COUNTED if k in counters})
        if finished and not ahead:
            weights.append(apart(folder, reference))
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
