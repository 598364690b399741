"""RLP on a CPU, in minutes: from a base model that can think but rarely does, beside its controls.

    python -m examples.demo [--out runs/demo] [--seeds 0 1] [--fresh]

Makes the dial corpus and pretrains a small base model on it with the objective `ntp`, or takes the cached
one. Then compares (rlpretrain/experiments/compare.py) RLP with `ntp` on the same tokens and with `ntp` on the
same compute, and prints one table. Each training is a run folder under --out; the numbers go to results.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rlpretrain import Pretrainer
from rlpretrain.config import ConfigError, ModelConfig
from rlpretrain.config.io import build, read_mapping
from rlpretrain.corpora import dial
from rlpretrain.experiments import compare
from rlpretrain.experiments.experiment import overlay
from rlpretrain.models import load_model, load_tokenizer
from rlpretrain.training.records import write_json

HERE = Path(__file__).parent
BASE_SEEDS = (0, 1, 2)
GATE = 0.9
"""Skill below which a base model is rejected."""
HELD_OUT = 1_200
DEPTHS = ("1", "2", "3", "4")
"""Depths of the training problems; the held-out ones go to 6."""
LABELS = {"base": "base", "rlp": "RLP", "ntp_tokens": "NTP, same tokens", "ntp_compute": "NTP, same compute"}
NUMBERS = {
    "direct": "answers directly",
    "think_sampled": "thinks, sampled",
    "think_greedy": "thinks, greedy",
    "gain_frozen": "gain (nats)",
    "no_think_loss": "no-think loss",
}
CONTROLS = ("empty", "shuffled", "other")


def main(argv: Sequence[str] | None = None) -> int:
    """Corpus, base model, comparison, table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="seeds of the trainings")
    parser.add_argument(
        "--base-seeds", type=int, nargs="+", default=BASE_SEEDS, help="tried until one passes the gate"
    )
    parser.add_argument("--fresh", action="store_true", help="delete --out first, the base model too")
    args = parser.parse_args(argv)
    begin = time.perf_counter()
    if args.fresh:
        shutil.rmtree(args.out, ignore_errors=True)
    try:
        make_corpus(args.out)
        base_seconds = make_base(args.out, args.base_seeds)
        arms = "rlp, ntp on the same tokens, and ntp on the same compute"
        print(f"training {arms}, seeds {args.seeds} ...", flush=True)
        demo = experiment(args.out, args.seeds)
        compare.run(demo, HERE, say=lambda line: print(line, flush=True))
    except ConfigError as error:
        raise SystemExit(f"demo: {error}") from None
    results = collect(demo)
    results["seconds"] |= {"base": base_seconds, "total": time.perf_counter() - begin}
    write_json(args.out / "results.json", results)
    show(results)
    print(f"numbers: {args.out / 'results.json'}; {results['seconds']['total']:.0f} seconds in all")
    return 0


def make_corpus(out: Path) -> None:
    """The dial corpus under `out`/corpus."""
    if not (out / "corpus" / "model" / "config.json").exists():
        print("making the dial corpus ...", flush=True)
        dial.write(out / "corpus", base=130_000, held_out=HELD_OUT)


def make_base(out: Path, seeds: Sequence[int]) -> float:
    """Pretrain a base model that passes the gate, under `out`/base; returns the seconds (0 if cached)."""
    if (out / "base" / "model" / "model.safetensors").exists():
        print(f"base model: cached in {out / 'base'}")
        return 0.0
    begin = time.perf_counter()
    for seed in seeds:
        print(f"pretraining the base model from scratch, seed {seed} ...", flush=True)
        skill = pretrain_base(out, out / "base-unchecked", seed)
        print(f"skill of the base model (teacher-forced values of true traces): {skill:.3f}", flush=True)
        if skill >= GATE:
            shutil.rmtree(out / "base", ignore_errors=True)
            (out / "base-unchecked").rename(out / "base")
            return time.perf_counter() - begin
    raise SystemExit(
        f"no base model reached skill {GATE} with the seeds {list(seeds)}: try others with --base-seeds"
    )


def pretrain_base(out: Path, folder: Path, seed: int) -> float:
    """Pretrain one base model from scratch on the corpus under `out`; returns its skill in true traces."""
    shutil.rmtree(folder, ignore_errors=True)
    changes = {
        "model": str(out / "corpus" / "model"),
        "data": str(out / "corpus" / "base.jsonl"),
        "output_dir": str(folder),
        "seed": seed,
        "console": True,
    }
    Pretrainer(build(overlay(read_mapping(HERE / "dial_base.yaml"), changes))).train()
    trained = ModelConfig(path=str(folder / "model"))
    return dial.trace_skill(load_model(trained), load_tokenizer(trained))


def experiment(out: Path, seeds: Sequence[int]) -> compare.Experiment:
    """RLP, and next-token prediction on RLP's documents and on as many as its compute pays for."""
    ntp = {"config": "dial_rlp.yaml", "like": "rlp"}
    compute = {"objective": "ntp", "positions_per_step": 64}
    values = {
        "methods": {
            "rlp": {"config": "dial_rlp.yaml"},
            "ntp_tokens": {**ntp, "match": "tokens", "set": {"objective": "ntp"}},
            "ntp_compute": {**ntp, "match": "flops", "cost_from": "ntp_tokens", "set": compute},
        },
        "common": {"model": str(out / "base" / "model"), "data": str(out / "corpus" / "train.jsonl")},
        "evaluation": {
            "data": {"path": str(out / "corpus" / "held_out.jsonl"), "meta_columns": ["depth"]},
            "objective": {"name": "rlp", "positions": "after", "marker": "shows"},
            "documents": HELD_OUT,
            "thoughts": 2,
            "max_thought_tokens": 32,
            "greedy": True,
            "own": False,
        },
        "seeds": list(seeds),
        "jobs": os.cpu_count() or 1,
        "output_dir": str(out),
    }
    return compare.build_experiment(values, HERE)


def collect(demo: compare.Experiment) -> dict[str, Any]:
    """results.json: every number with its 95% interval over problems and seeds, and each seed's mean."""
    results: dict[str, Any] = {"seeds": list(demo.seeds), "by_k": {}, "seconds": {}}
    for name, measured in compare.read_measurements(demo).items():
        trained_depths = measured.where("depth", DEPTHS)
        results[name] = numbers(trained_depths, NUMBERS)
        results["by_k"][name] = {
            depth: numbers(measured.where("depth", (depth,)), NUMBERS)
            for depth in sorted(set(measured.meta["depth"]))
        }
        if name == "rlp":
            results["controls"] = numbers(trained_depths, CONTROLS)
        if name != compare.BASE:
            results["seconds"][name] = [
                training_seconds(Path(demo.output_dir) / f"{name}-{seed}") for seed in demo.seeds
            ]
    return results


def numbers(measured: compare.Measurements, names: Sequence[str] | dict[str, str]) -> dict[str, Any]:
    """The mean of each number, its interval as `_ci`, and each seed's mean as `_seeds`."""
    values: dict[str, Any] = {}
    for name in names:
        mean, low, high = measured.interval(name)
        values |= {name: mean, f"{name}_ci": [low, high], f"{name}_seeds": measured.means(name)}
    return values


def training_seconds(folder: Path) -> float:
    """Seconds of all steps of a run."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return sum(json.loads(line)["step_time"] for line in lines)


def show(results: dict[str, Any]) -> None:
    """Print the numbers of all models, accuracy by depth, and RLP's controls."""

    def cell(row: dict[str, Any], name: str) -> str:
        low, high = row[f"{name}_ci"]
        return f"{row[name]:.2f} [{low:.2f}, {high:.2f}]"

    title = f"Depths 1 to 4, held-out problems, seeds {results['seeds']}; 95% intervals"
    models = Table("", *NUMBERS.values(), title=title)
    depths = Table("thinks, sampled, by depth", *(f"k={depth}" for depth in results["by_k"]["rlp"]))
    for name, label in LABELS.items():
        models.add_row(label, *(cell(results[name], number) for number in NUMBERS))
        by_depth = results["by_k"][name].values()
        depths.add_row(label, *(f"{row['think_sampled']:.2f}" for row in by_depth))
    controls = [f"{name} {cell(results['controls'], name)}" for name in CONTROLS]
    console = Console(width=120)
    console.print(models)
    console.print(depths)
    console.print("gain of thoughts that should not help (nats): " + ", ".join(controls))


if __name__ == "__main__":
    sys.exit(main())
