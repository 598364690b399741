"""Do all engines train equally well? The demo's RLP recipe from one base model, once with each engine.

    python -m benchmarks.engines [--engines hf vllm_local vllm_server ray zero3] [--steps 260] [--seeds 0]
    [--json]

`ray` is one actor with vllm_local; `zero3` is DeepSpeed ZeRO 3 on two gloo ranks with one vLLM server. This
script starts and ends the servers. Base model, documents, seed and evaluation (always by transformers) are
those of `examples/demo.py`; a base under --demo is used, or made there. Engines draw different tokens, so
runs can only agree within noise: the difference between seeds of `hf` in results/robustness.json. Every
training is a process of its own; finished ones are kept (OUT/NAME.json) and not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

from benchmarks.dial_runs import evaluation, numbers, train
from benchmarks.engines_processes import child, server
from benchmarks.engines_table import REPORTED, table
from examples.demo import BASE_SEEDS, DEPTHS, HERE, make_base, make_corpus
from rlpretrain.training.records import write_json

VLLM = {"kv_cache_gib": 0.1, "block_size": 32}
SERVER = {"name": "vllm_server", "block_size": 32}
ENGINES: dict[str, dict[str, Any]] = {
    "hf": {},
    "vllm_local": {"engine": {"name": "vllm_local", **VLLM}},
    "vllm_server": {"engine": SERVER},
    "ray": {"engine": {"name": "ray", "of": "vllm_local", "num_engines": 1, "address": "local", **VLLM}},
    "zero3": {
        "engine": SERVER,
        "policy": {"backend": "deepspeed", "deepspeed_config": "examples/cluster/zero3.json"},
    },
}
# zero3.json has a low persistence threshold: with DeepSpeed's default, weights this small are not sharded.
RANKS = {"zero3": 2}
MEDIANS = {
    "step_s": "step_time",
    "rollout_s": "perf/rollout_s",
    "train_s": "perf/train_s",
    "sync_s": "perf/sync_s",
    "probe_s": "perf/probe_s",
}
STEPS = 260
# 97.5% point of Student's t with 6 degrees of freedom: nine runs, less a mean for each of three bases
STUDENT = 2.447


def main(argv: Sequence[str] | None = None) -> int | str:
    """Everything, or (with --job) one training."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--engines", nargs="+", choices=list(ENGINES), default=list(ENGINES), metavar="ENGINE"
    )
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, default=Path("runs/engines"))
    parser.add_argument(
        "--demo", type=Path, default=Path("runs/demo"), help="folder of examples/demo.py: corpus and base"
    )
    parser.add_argument(
        "--fresh", action="store_true", help="forget the results of these engines and seeds first"
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.job:
        return job(**json.loads(args.job))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that child processes are ended too
    with redirect_stdout(sys.stderr):
        make_corpus(args.demo)
        make_base(args.demo, BASE_SEEDS)
    args.out.mkdir(parents=True, exist_ok=True)
    runs = [(engine, seed) for engine in args.engines for seed in args.seeds]
    failed = [named(*r) for r in runs if not run(*r, args.steps, args.out, args.demo, args.fresh)]
    results = collect(args.out, args.demo, args.engines, args.seeds, args.steps)
    write_json(args.out / "results.json", results)
    print(json.dumps(results) if args.json else table(results))
    return f"failed: {', '.join(failed)}; the others are kept" if failed else 0


def named(engine: str, seed: int) -> str:
    """The name of a run's folder, log and result."""
    return f"{engine}-{seed}" if seed else engine


def known(file: Path, steps: int) -> dict[str, Any] | None:
    """The stored result of a run, if it has this number of steps."""
    result = json.loads(file.read_text()) if file.exists() else None
    return result if result and result["asked_steps"] == steps else None


def run(engine: str, seed: int, steps: int, out: Path, demo: Path, fresh: bool) -> bool:
    """Train in a child process, with a server if it needs one, and evaluate; whether there is a result."""
    name = named(engine, seed)
    file, folder, log = out / f"{name}.json", out / name, out / f"{name}.log"
    if not fresh and known(file, steps):
        return True
    for old in (file, log):
        old.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    base, corpus = demo / "base" / "model", demo / "corpus"
    what = {
        "engine": engine,
        "seed": seed,
        "steps": steps,
        "base": str(base),
        "data": str(corpus / "train.jsonl"),
    }
    served = (
        server(base, out / f"{name}-server.log") if ENGINES[engine].get("engine") is SERVER else nullcontext()
    )
    try:
        with served as url:
            seconds = launched(what | {"folder": str(folder), "url": url}, RANKS.get(engine, 1), log)
    except RuntimeError as error:
        print(f"{name}: {error}", file=sys.stderr, flush=True)
        return False
    scores = evaluation(folder / "model", base, corpus / "held_out.jsonl", seed, controls=False)
    record = json.loads((folder / "run.json").read_text())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    facts = {key: record[key] for key in ("step", "stopped", "ranks", "backend")}
    write_json(
        file,
        facts | {"asked_steps": steps, "seconds": seconds, "timings": timings(rows), "evaluation": scores},
    )
    print(f"{name}: {seconds:.0f} s, stopped: {record['stopped']}", file=sys.stderr, flush=True)
    return True


def launched(what: dict[str, Any], ranks: int, log: Path) -> float:
    """Seconds of one training; a RuntimeError with the end of its log if it fails."""
    start = [sys.executable, "-m"]
    start += ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"] if ranks > 1 else []
    begin = time.perf_counter()
    with child([*start, "benchmarks.engines", "--job", json.dumps(what)], log) as process:
        code = process.wait()
    if code:
        raise RuntimeError(f"exit code {code}; the end of {log}:\n{log.read_text(errors='replace')[-2000:]}")
    return time.perf_counter() - begin


def job(engine: str, seed: int, steps: int, base: str, folder: str, data: str, url: str | None) -> int:
    """One training, in this process; on several ranks one of them."""
    changes = ENGINES[engine] | ({"engine": SERVER | {"urls": [url]}} if url else {})
    train(
        "dial_rlp.yaml",
        model=Path(base),
        data=Path(data),
        output_dir=Path(folder),
        seed=seed,
        max_steps=steps,
        **changes,
    )
    return 0


def timings(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Median seconds over steps, the parts of a weight sync, and the largest differences to the trainer."""

    def of(name: str) -> list[float]:
        return [row[name] for row in rows if row.get(name) is not None]

    parts = sorted(
        {name for row in rows for name in row if name.startswith("perf/weight_sync") and name.endswith("_s")}
    )
    out: dict[str, Any] = {
        short: statistics.median(of(name)) if of(name) else None for short, name in MEDIANS.items()
    }
    out["weight_sync"] = {
        name.removeprefix("perf/weight_sync_"): statistics.median(of(name)) for name in parts
    }
    out["probe_difference_max"] = max(of("sampling/probe_difference"), default=None)
    out["abs_log_ratio_max"] = max(of("sampling/abs_log_ratio_max"), default=None)
    return out


def collect(
    out: Path, demo: Path, engines: Sequence[str], seeds: Sequence[int], steps: int
) -> dict[str, Any]:
    """All numbers, and for each engine the differences from `hf` beside the noise of `hf`."""
    base = demo / "base" / "model"
    before = [
        evaluation(base, base, demo / "corpus" / "held_out.jsonl", seed, controls=False) for seed in seeds
    ]
    limits = noise(len(seeds)) if steps == STEPS else None
    results: dict[str, Any] = {
        "steps": steps,
        "seeds": list(seeds),
        "base": numbers(before, DEPTHS, REPORTED),
        "engines": {},
        "noise": limits,
    }
    for engine in engines:
        parts = [known(out / f"{named(engine, seed)}.json", steps) for seed in seeds]
        if not all(parts):
            continue
        row = numbers([part["evaluation"] for part in parts if part], DEPTHS, REPORTED)
        row["runs"] = [{k: v for k, v in part.items() if k != "evaluation"} for part in parts if part]
        first = results["engines"].get("hf")
        if first and engine != "hf":
            row["minus_hf"] = {name: row[name] - first[name] for name in REPORTED}
            row["within_noise"] = limits and {
                name: abs(row["minus_hf"][name]) <= limits[name] for name in REPORTED
            }
        results["engines"][engine] = row
    return results


def noise(seeds: int) -> dict[str, float]:
    """The chance difference of two means of `seeds` runs of one recipe and base, in 19 of 20 pairs."""
    runs = json.loads((HERE.parent / "benchmarks" / "results" / "robustness.json").read_text())["runs"]
    runs = [row for row in runs if row["recipe"] == "recipe"]
    groups = [[row for row in runs if row["base"] == b] for b in sorted({row["base"] for row in runs})]
    pooled = {
        name: statistics.mean(statistics.variance(row[name] for row in group) for group in groups)
        for name in REPORTED
    }
    return {name: STUDENT * (2 * variance / seeds) ** 0.5 for name, variance in pooled.items()}


if __name__ == "__main__":
    os.chdir(HERE.parent)
    sys.exit(main())
