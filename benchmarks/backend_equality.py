"""One training on all backends and numbers of ranks: how far the trained weights differ from torch's on one.

    python -m benchmarks.backend_equality [--ranks 1 2 4] [--out runs/backend_equality] [--json]

A small Qwen3 in float32 trains three steps of RLP on the dial corpus, with uneven micro-batches, on gloo
ranks: all weights, and LoRA with the frozen base as the baseline. A number is the largest difference of any
weight of the saved model. `resumed` continues a checkpoint that two ranks wrote after the first step.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rlpretrain.corpora import dial
from tests.builders.configs import tiny_values
from tests.builders.policies import SHARDED
from tests.builders.runs import launch, merged, weights
from tests.builders.tiny import tiny_model

BACKENDS: dict[str, dict[str, Any]] = {
    "torch": {"backend": "torch"},
    "deepspeed, ZeRO 0": {"backend": "deepspeed", "zero_stage": 0},
    "deepspeed, ZeRO 1": {"backend": "deepspeed", "zero_stage": 1},
    "deepspeed, ZeRO 2": {"backend": "deepspeed", "zero_stage": 2},
    "deepspeed, ZeRO 3": {"backend": "deepspeed", "deepspeed_config": SHARDED},
    "fsdp": {"backend": "fsdp"},
    "fsdp, reshard false": {"backend": "fsdp", "fsdp": {"reshard": False}},
    "fsdp, 2 replicas": {"backend": "fsdp", "fsdp": {"replicas": 2}},
}
WEIGHTS: dict[str, dict[str, Any]] = {
    "all weights": {},
    "LoRA": {"policy__lora": {"r": 2}, "baseline__name": "frozen"},
}
RESUMED = ("torch", "fsdp")


def main(argv: list[str] | None = None) -> int:
    """Train, compare, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--out", type=Path, default=Path("runs/backend_equality"))
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    shutil.rmtree(args.out, ignore_errors=True)
    corpus = write_corpus(args.out / "dial")
    base = merged(tiny_values(corpus, args.out), token_budget=150, positions_per_step=8, checkpoint__every=1)
    configs = {
        (backend, kind): merged(base, policy=dict(settings), **changes)
        for backend, settings in BACKENDS.items()
        for kind, changes in WEIGHTS.items()
    }
    rows = []
    for size in sorted({1, 2, *args.ranks}):  # two ranks write what is resumed
        there = {key: config for key, config in configs.items() if size > 1 or key[0] != "fsdp, 2 replicas"}
        train({key: args.out / name_of(*key, size) for key in there}, there, args.out, size)
        rows += [row_of(*key, size, args.out) for key in there]
    for size in args.ranks:
        if size != 2:
            there = {key: config for key, config in configs.items() if key[0] in RESUMED}
            folders = {key: args.out / f"{name_of(*key, size)}-resumed" for key in there}
            for key, folder in folders.items():
                shutil.copytree(args.out / name_of(*key, 2) / "checkpoint-1", folder / "checkpoint-1")
            train(folders, there, args.out, size, resume="auto")
            rows += [row_of(*key, size, args.out, "-resumed") for key in there]
    if args.json:
        print(json.dumps({"rows": rows}, indent=1))
    else:
        show(rows)
    return 0


def write_corpus(folder: Path) -> Path:
    """The dial corpus with a random model of its vocabulary."""
    dial.write(folder, base=200, train=200, held_out=48)
    tiny_model("qwen3", vocab_size=len(dial.WORDS), seed=3).save_pretrained(folder / "base")
    dial.tokenizer().save_pretrained(folder / "base")
    return folder


def name_of(backend: str, kind: str, size: int) -> str:
    """The folder of a training."""
    return f"{backend}-{kind}-{size}".replace(" ", "_").replace(",", "")


def train(
    folders: dict[Any, Path], configs: dict[Any, dict[str, Any]], out: Path, size: int, **more: Any
) -> None:
    """Train all on so many ranks, in one process group."""
    print(f"{len(folders)} trainings on {size} ranks ...", file=sys.stderr, flush=True)
    jobs = [{"config": merged(configs[key], output_dir=str(folders[key]))} | more for key in folders]
    launch(jobs, out, size)


def row_of(backend: str, kind: str, size: int, out: Path, ending: str = "") -> dict[str, Any]:
    """The largest difference of a weight, and of the gradient norms, from torch's on one rank."""
    expected = out / name_of("torch", kind, 1)
    folder = out / f"{name_of(backend, kind, size)}{ending}"
    ours, theirs = weights(folder / "model"), weights(expected / "model")
    difference = max(float((ours[name] - theirs[name]).abs().max()) for name in theirs)
    return {
        "backend": backend,
        "weights": kind,
        "ranks": size,
        "resumed": bool(ending),
        "difference": difference,
    }


def show(rows: list[dict[str, Any]]) -> None:
    """A line for each backend and kind of weights, a column for each number of ranks."""
    sizes = sorted({row["ranks"] for row in rows})
    table = Table("backend", "trained", *(f"{size} ranks" for size in sizes))
    for key in dict.fromkeys((row["backend"], row["weights"], row["resumed"]) for row in rows):
        found = {
            row["ranks"]: row["difference"]
            for row in rows
            if (row["backend"], row["weights"], row["resumed"]) == key
        }
        cells = [f"{found[size]:.1e}" if size in found else "" for size in sizes]
        table.add_row(key[0] + ", resumed from 2 ranks" * key[2], key[1], *cells)
    Console(width=120).print(table)


if __name__ == "__main__":
    sys.exit(main())
