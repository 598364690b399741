"""One recipe on several bases and seeds: does any run collapse? Beside it the paper's thought-only update.

    python -m benchmarks.robustness [--out runs/robustness] [--base-seeds 0 1 2] [--seeds 0 1 2] [--json]

Base models are pretrained with the demo's settings from other seeds, and must pass a gate on skill (if one
fails, the next seed is tried). Every training is evaluated on held-out problems of the trained depths.
Finished runs are kept and not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.dial_runs import evaluation, numbers, train
from examples.demo import DEPTHS, GATE, HERE, make_corpus
from rlpretrain.training.records import write_json

RECIPES: dict[str, dict[str, Any]] = {
    "recipe": {},
    "thought only (paper)": {
        "objective__clip": None,
        "loss__ntp_coef": 0.0,
        "loss__reader_coef": 0.0,
        "stop": {"collapse": False},
    },
}
REPORTED = ("think_sampled", "think_greedy", "direct", "gain_frozen", "no_think_loss")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/robustness"))
    parser.add_argument("--base-seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--collect", action="store_true", help="only the table of the finished runs")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.job:
        return job(args.out, json.loads(args.job))
    if not args.collect:
        make_corpus(args.out)
        run_jobs(args.out, [{"base": s} for s in args.base_seeds])
        run_jobs(
            args.out,
            [
                {"base": b, "seed": s, "recipe": r}
                for r in RECIPES
                for b in args.base_seeds
                for s in args.seeds
            ],
        )
    results = collect(args.out, args.base_seeds, args.seeds)
    write_json(args.out / "results.json", results)
    print(json.dumps(results) if args.json else table(results))
    return 0


def run_jobs(out: Path, jobs: Sequence[dict[str, Any]]) -> None:
    """One process per job, as many at a time as there are cores, one thread each."""
    waiting, running = list(jobs), []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    while waiting or running:
        while waiting and len(running) < (os.cpu_count() or 1):
            command = [
                sys.executable,
                "-m",
                "benchmarks.robustness",
                "--out",
                str(out),
                "--job",
                json.dumps(waiting.pop(0)),
            ]
            running.append(subprocess.Popen(command, env=environment))
        for process in [p for p in running if p.poll() is not None]:
            running.remove(process)
            if process.returncode:
                raise SystemExit(f"a job failed: {process.args}")
        time.sleep(0.2)


def job(out: Path, what: dict[str, Any]) -> int:
    """Pretrain a base model, or train from it and evaluate."""
    if "seed" not in what:
        return make_base(out, what["base"])
    base, corpus = out / f"base-{what['base']}", out / "corpus"
    name = f"{what['recipe'].split()[0]}-{what['base']}-{what['seed']}"
    if (out / f"{name}.json").exists():
        return 0
    shutil.rmtree(out / name, ignore_errors=True)
    begin = time.perf_counter()
    ended = train(
        "dial_rlp.yaml",
        model=base / "model",
        data=corpus / "train.jsonl",
        output_dir=out / name,
        seed=what["seed"],
        **RECIPES[what["recipe"]],
    )
    seconds = time.perf_counter() - begin
    scores = evaluation(
        out / name / "model", base / "model", corpus / "held_out.jsonl", what["seed"], controls=True
    )
    write_json(out / f"{name}.json", scores | {"stopped": ended["stopped"], "seconds": seconds})
    print(f"{name}: {seconds:.0f} s, stopped: {ended['stopped']}", file=sys.stderr, flush=True)
    return 0


def make_base(out: Path, seed: int) -> int:
    """Pretrain base `seed` (trying seed + 100, ... while the gate is not passed) and evaluate it."""
    from rlpretrain.config import ModelConfig
    from rlpretrain.corpora import dial
    from rlpretrain.models import load_model, load_tokenizer

    folder, failed = out / f"base-{seed}", []
    if (out / f"base-{seed}.json").exists():
        return 0
    for attempt in range(seed, seed + 500, 100):
        shutil.rmtree(folder, ignore_errors=True)
        train(
            "dial_base.yaml",
            model=out / "corpus" / "model",
            data=out / "corpus" / "base.jsonl",
            output_dir=folder,
            seed=attempt,
        )
        config = ModelConfig(path=str(folder / "model"))
        skill = dial.trace_skill(load_model(config), load_tokenizer(config))
        print(f"base {seed}: pretrained from seed {attempt}, skill {skill:.3f}", file=sys.stderr, flush=True)
        if skill >= GATE:
            scores = evaluation(
                folder / "model", folder / "model", out / "corpus" / "held_out.jsonl", 0, controls=False
            )
            write_json(
                out / f"base-{seed}.json",
                scores | {"from_seed": attempt, "skill": skill, "failed_seeds": failed},
            )
            return 0
        failed.append(attempt)
    return 1


def collect(out: Path, base_seeds: Sequence[int], seeds: Sequence[int]) -> dict[str, Any]:
    """All numbers: per base, per run, and the lowest of each recipe."""
    results: dict[str, Any] = {"bases": [], "runs": [], "lowest": {}, "collapsed": {}}
    for b in base_seeds:
        part = json.loads((out / f"base-{b}.json").read_text())
        keep = {k: part[k] for k in ("from_seed", "skill", "failed_seeds")}
        results["bases"].append({"base": b, **keep, **numbers([part], DEPTHS, REPORTED)})
    for recipe in RECIPES:
        rows = []
        for b in base_seeds:
            for s in seeds:
                file = out / f"{recipe.split()[0]}-{b}-{s}.json"
                if not file.exists():  # with --collect: the runs so far
                    continue
                part = json.loads(file.read_text())
                controls = numbers([part], DEPTHS, ("empty", "shuffled", "other"))
                rows.append(
                    {
                        "recipe": recipe,
                        "base": b,
                        "seed": s,
                        "stopped": part["stopped"],
                        "seconds": part["seconds"],
                        **numbers([part], DEPTHS, REPORTED),
                        "controls": controls,
                    }
                )
        results["runs"] += rows
        if not rows:
            continue
        results["lowest"][recipe] = min(r["think_sampled"] for r in rows)
        start = {r["base"]: r for r in results["bases"]}
        results["collapsed"][recipe] = sum(
            r["think_sampled"] < start[r["base"]]["think_sampled"] for r in rows
        )
    return results


def table(results: dict[str, Any]) -> str:
    """Markdown: a row per base and recipe, the seeds side by side."""
    lines = [
        "| base | before: sampled, direct | recipe | after, sampled, by seed | gain (nats) | no-think loss "
        "before → after |",
        "|---|---|---|---|---|---|",
    ]
    for base in results["bases"]:
        for recipe in RECIPES:
            rows = [r for r in results["runs"] if r["recipe"] == recipe and r["base"] == base["base"]]
            sampled = " / ".join(f"{r['think_sampled']:.3f}" for r in rows)
            gain = " / ".join(f"{r['gain_frozen']:+.2f}" for r in rows)
            losses = " / ".join(f"{r['no_think_loss']:.3f}" for r in rows)
            before = f"{base['think_sampled']:.3f}, {base['direct']:.3f}"
            start = f"{base['no_think_loss']:.3f}"
            lines.append(
                f"| {base['base']} | {before} | {recipe} | {sampled} | {gain} | {start} → {losses} |"
            )
    return "\n".join(lines) + f"\n\nlowest: {results['lowest']}; below their base: {results['collapsed']}"


if __name__ == "__main__":
    os.chdir(HERE.parent)
    sys.exit(main())
