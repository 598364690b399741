"""What a sync sends by `engine.transfer` changes and file: RLP on SmolLM2-135M, a bfloat16 service.

    python -m benchmarks.weight_changes [--rates 1e-6 1e-5 1e-4] [--steps 8] [--out FOLDER] [--json]

One `rlpretrain serve` with the transformers engine. Each rate and transfer is a run of its own, from the
checkpoint and with the same seed. MiB and seconds are medians over the syncs after the first step, since
AdamW's first step moves every number by its whole rate.
`scripts/setup.sh real-cpu` installs the checkpoint.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.engines_processes import child, wait_until_ready
from benchmarks.real_matrix import How, settings, write_documents
from examples.smollm2_checkpoint import make_checkpoint
from tests.builders.servers import free_port

PARTS = ("gather_s", "write_s", "load_s", "mib")


def main(argv: Sequence[str] | None = None) -> int:
    """All runs; their numbers as a table or JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-6, 1e-5, 1e-4])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("runs/weight_changes"))
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    with redirect_stdout(sys.stderr):
        make_checkpoint(args.out / "checkpoint")
        write_documents(args.out / "documents.jsonl")
        found = measure(args.out, args.rates, args.steps)
    print(json.dumps({"steps": args.steps, "rows": found})) if args.json else show(found)
    return 0


def measure(out: Path, rates: Sequence[float], steps: int) -> list[dict[str, Any]]:
    """The numbers of every rate and transfer, against one service."""
    port, weights, log = free_port(), out / "weights", out / "service.log"
    weights.mkdir(exist_ok=True)
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "rlpretrain.cli", "serve", str(out / "checkpoint"), "--engine", "hf"]
    command += ["--dtype", "bfloat16", "--port", str(port), "--weights-dir", str(weights)]
    with child(command, log) as process:
        wait_until_ready(url, process, log, 600.0)
        return [run(out, rate, transfer, steps, url) for rate in rates for transfer in ("file", "changes")]


def run(out: Path, rate: float, transfer: str, steps: int, url: str) -> dict[str, Any]:
    """One training; medians over its syncs after the first, and the first one's MiB."""
    from rlpretrain import Pretrainer
    from rlpretrain.config.io import build

    folder = out / f"{transfer}-{rate:g}"
    shutil.rmtree(folder, ignore_errors=True)
    values = settings("rlp", "hf", "all", folder, How(steps))
    values["optim"] = {"lr": rate}
    values["engine"] = {
        "name": "vllm_server",
        "urls": [url],
        "weights_dir": str(out / "weights" / folder.name),
        "transfer": transfer,
        "dtype": "bfloat16",
    }
    Pretrainer(build(values)).train()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    of = {part: [row[f"perf/weight_sync_{part}"] for row in rows] for part in PARTS}
    return {
        "rate": rate,
        "transfer": transfer,
        "first_mib": of["mib"][0],
        "probe_difference_max": max(row["sampling/probe_difference"] for row in rows),
    } | {part: statistics.median(numbers[1:]) for part, numbers in of.items()}


def show(rows: Sequence[dict[str, Any]]) -> None:
    """A line for each run."""
    table = Table("rate", "transfer", "MiB", "of the first step", *(f"{part[:-2]} s" for part in PARTS[:-1]))
    for row in rows:
        table.add_row(
            f"{row['rate']:g}",
            row["transfer"],
            f"{row['mib']:.1f}",
            f"{row['first_mib']:.1f}",
            *(f"{row[part]:.2f}" for part in PARTS[:-1]),
        )
    Console().print(table)


if __name__ == "__main__":
    raise SystemExit(main())
