"""One optimization step on the same thoughts: trees, padded rows, TRL, and next-token training.

    python -m benchmarks.step [--grid | --curves] [--rounds 3] [--json]
                              [--shape document=2048 thoughts=16 thought=256]
    python -m benchmarks.step --plot benchmarks/results

- tree: `packing: tree`, with rewards, policy loss, reader term and next-token loss in one pass.
- padded: the same in one pass over padded rows; `scored_first` scores all thoughts in a separate pass before
  it trains.
- trl: TRL's GRPOTrainer (fused head) with an information-gain reward that scores with the live model,
  batched, without gradient.
- ntp: next-token training on documents of the same length, which gives the cost of a token.

The model has the shape of Qwen3 and runs in float32 on random documents and random thoughts. Each kind and
round runs in a process of its own, in turns. The figures are medians of the ratios within a round. All kinds
have the same token budget for a micro-batch. Memory is the peak of the steps after the first, minus what the
process held when they began (weights and optimizer states); malloc returns its free memory before that is
measured.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.step_inputs import CURVES, GRID, Shape, count_tokens, write_model
from benchmarks.step_plot import plot
from benchmarks.step_runs import measure_steps

KINDS = ("tree", "padded", "scored_first", "trl", "ntp")


@dataclass(frozen=True)
class Settings:
    """How a shape is measured."""

    kinds: Sequence[str]
    rounds: int
    steps: int
    trl_steps: int | None
    threads: int

    def steps_of(self, kind: str) -> int:
        """Steps of a run of this kind."""
        return self.trl_steps if kind == "trl" and self.trl_steps else self.steps


def run_in_child(kind: str, shape: Shape, settings: Settings) -> dict[str, Any]:
    """What `measure_steps` returns, from a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), shape)
        task = {
            "kind": kind,
            "folder": folder,
            "shape": asdict(shape),
            "threads": settings.threads,
            "steps": settings.steps_of(kind),
        }
        child = subprocess.run(
            [sys.executable, "-m", "benchmarks.step", "--one", json.dumps(task)],
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": str(settings.threads)},
        )
    if child.returncode:
        raise SystemExit(f"{kind}: {child.stderr[-3000:]}")
    return json.loads(child.stdout.splitlines()[-1])


def measure(shape: Shape, settings: Settings) -> dict[str, Any]:
    """All kinds, in turns: medians of their seconds and memory, and ratios."""
    kinds = tuple(settings.kinds)
    results: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
    for turn in range(settings.rounds):
        first = turn % len(kinds)
        for kind in kinds[first:] + kinds[:first]:
            result = run_in_child(kind, shape, settings)
            results[kind].append(result)
            print(f"{kind} {result}", file=sys.stderr, flush=True)
    return summarize(shape, results)


def summarize(shape: Shape, results: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians and ratios of the rounds of one shape."""

    def median(kind: str, name: str) -> float:
        return statistics.median(result[name] for result in results[kind])

    def ratio(a: str, b: str, name: str = "seconds") -> float:
        return statistics.median(x[name] / y[name] for x, y in zip(results[a], results[b], strict=True))

    tree_tokens, padded_tokens = count_tokens(shape, "tree"), count_tokens(shape, "padded")
    ntp_tokens = max(1, tree_tokens // shape.document) * shape.document
    summary: dict[str, Any] = {
        "shape": asdict(shape),
        "tokens": {"tree": tree_tokens, "padded": padded_tokens},
        "token_ratio": padded_tokens / tree_tokens,
        "seconds": {kind: median(kind, "seconds") for kind in results},
        "mib": {kind: median(kind, "bytes") / 2**20 for kind in results},
    }
    if "tree" not in results:
        return summary
    for kind in ("padded", "scored_first"):
        if kind in results:
            summary[f"ratio_{kind}"] = ratio(kind, "tree")
    if "ntp" in results:
        summary["token_cost"] = ratio("tree", "ntp") * ntp_tokens / tree_tokens
    if "trl" in results:
        summary |= {"ratio_trl": ratio("trl", "tree"), "memory_ratio_trl": ratio("tree", "trl", "bytes")}
    return summary


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="One optimisation step: tree, padded, TRL, next-token training."
    )
    parser.add_argument(
        "--shape", nargs="+", default=[], metavar="NAME=N", help=", ".join(f.name for f in fields(Shape))
    )
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument(
        "--grid", action="store_true", help="documents 512 to 2048, 8 and 16 thoughts of 64 and 256 tokens"
    )
    parser.add_argument(
        "--curves", action="store_true", help="the tree alone, over thoughts and over vocabulary"
    )
    parser.add_argument(
        "--plot", type=Path, help="draw step.svg from step-grid.json and step-curves.json in this folder"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="the first warms up")
    parser.add_argument(
        "--trl-steps", type=int, help="for TRL; 1: its first step is timed, no warm-up (large shapes)"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # a task: one kind in this process
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    options = parse_arguments(argv)
    if options.one:
        task = json.loads(options.one)
        shape = Shape(**task["shape"])
        result = measure_steps(task["kind"], Path(task["folder"]), shape, task["steps"], task["threads"])
        return print(json.dumps(result))
    if options.plot:
        return plot(options.plot)
    changes = dict(pair.split("=") for pair in options.shape)
    shape = replace(Shape(), **{name: int(value) for name, value in changes.items()})
    settings = Settings(options.kinds, options.rounds, options.steps, options.trl_steps, options.threads)
    report: dict[str, Any] = {
        "benchmark": "step",
        "torch": torch.__version__,
        "threads": options.threads,
        "rounds": options.rounds,
    }
    if options.curves:
        tree_only = replace(settings, kinds=["tree"])
        report["curves"] = {
            name: [measure(replace(shape, **{name: value}), tree_only) for value in values]
            for name, values in CURVES.items()
        }
    elif options.grid:
        report["grid"] = [measure(shape, settings) for shape in GRID]
    else:
        report |= measure(shape, settings)
    print(json.dumps(report) if options.json else json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
