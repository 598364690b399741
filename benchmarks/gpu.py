"""What the library does on a GPU, measured by one command on a bare machine.

    python -m benchmarks.gpu --minutes 8 [--peak 989e12] [--token-budget 22528] [--output FOLDER]
    python -m benchmarks.gpu --device cpu --tiny       # every line of it on a CPU, in a minute
    python -m benchmarks.gpu --needs                   # wheels to carry there, beyond torch

It needs a source checkout, torch with CUDA and the core dependencies, and no network. Each part runs in a
process of its own, with its share of the minutes, and its results are written as soon as they are known:
gpu.json, and gpu.md with tables. A part that fails or takes too long does not stop the others; the exit
status is then 1.

The model has the shape of Qwen3-0.6B, with random weights in bfloat16. MFU counts what the model needs once:
6 operations for each weight of a matrix and token, and attention's along each token's path. What is computed
again (activations, a document in every micro-batch, logits in the head's backward) is not counted.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

PARTS = {
    "environment": 0.02,
    "parity": 0.14,
    "compilation": 0.08,
    "steps": 0.28,
    "run": 0.15,
    "sampling": 0.07,
    "paths": 0.10,
    "methods": 0.08,
    "services": 0.08,
}
"""Names in their order, and their shares of the minutes."""
MODULES = {
    "environment": "gpu_environment",
    "parity": "gpu_checks",
    "compilation": "gpu_checks",
    "steps": "gpu_steps",
    "sampling": "gpu_steps",
    "run": "gpu_steps",
    "paths": "gpu_paths",
    "methods": "gpu_methods",
    "services": "gpu_services",
}
"""Where the function `measure_NAME` of each part is; each process imports only its own."""
OLDEST = {"torch": "2.11", "vllm": "0.26"}
"""The oldest versions that are tried here; the library asks for newer ones (rlpretrain/floors.py)."""
ROOT = Path(__file__).resolve().parents[1]


def run_part(name: str, settings: Any, file: Path) -> None:
    """Run a part in this process; its cells so far are always in `file`."""
    from rlpretrain import floors

    # cards come with the torch that their drivers support; the parity part says whether it computes the same
    floors.OLDEST.update(OLDEST)
    measure = getattr(importlib.import_module(f"benchmarks.{MODULES[name]}"), f"measure_{name}")
    cells: list[dict[str, Any]] = []

    def report(cell: Any) -> None:
        cells.append(asdict(cell))
        write(file, json.dumps(cells))
        print(f"{name}: {cell.name}: {cell.error or cell.status}", file=sys.stderr, flush=True)

    measure(settings, report)


def run_in_child(name: str, options: argparse.Namespace, seconds: float, folder: Path) -> dict[str, Any]:
    """Run a part in a process of its own: {status, seconds, cells, error}."""
    file, errors = folder / f"gpu-{name}.part", folder / f"gpu-{name}.error"
    file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.gpu", "--part", name, "--part-file", str(file)]
    command += ["--device", options.device, "--token-budget", str(options.token_budget)]
    command += ["--part-seconds", str(seconds)] + ["--tiny"] * options.tiny
    command += ["--peak", str(options.peak)] if options.peak else []
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    environment.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    begin, error = time.perf_counter(), None
    child = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=sys.stderr, start_new_session=True)
    try:
        status = child.wait(timeout=seconds)
        if status:
            error = errors.read_text() if errors.exists() else f"exit status {status}"
    except subprocess.TimeoutExpired:
        error = f"stopped after its {seconds:.0f} s"
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    cells = json.loads(file.read_text()) if file.exists() else []
    file.unlink(missing_ok=True)
    errors.unlink(missing_ok=True)
    wrong = error or any(cell["status"] == "failed" for cell in cells) or not cells
    result = {"status": "failed" if wrong else "ok", "seconds": time.perf_counter() - begin, "cells": cells}
    return result | ({"error": error} if error else {})


def write(file: Path, text: str) -> None:
    """Write a file under a temporary name, then rename it."""
    part = file.with_name(file.name + ".new")
    part.write_text(text)
    os.replace(part, file)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Parity, compilations, training steps, sampling and a run on a GPU."
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="for all parts together")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and short documents")
    parser.add_argument(
        "--peak", type=float, help="operations a second of the card in dense bfloat16, for MFU"
    )
    parser.add_argument("--token-budget", type=int, default=22528, help="tokens of a micro-batch")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--output", type=Path, help="folder; benchmarks/results on a GPU, else runs/gpu")
    parser.add_argument("--needs", action="store_true", help="print the wheels to carry, and nothing else")
    for name in ("--part", "--part-file", "--part-seconds"):
        parser.add_argument(name, help=argparse.SUPPRESS)  # one part in this process
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts in turn; 1 if one failed."""
    options = parse_arguments(argv)
    if options.needs:
        from benchmarks.gpu_needs import needed_wheels

        print("\n".join(needed_wheels()))
        return 0
    if options.part:
        from benchmarks.gpu_shapes import Settings, resolve_peak

        settings = Settings(options.device, options.tiny, options.token_budget, options.peak)
        settings = replace(settings, seconds=float(options.part_seconds), peak=resolve_peak(settings))
        file = Path(options.part_file)
        try:
            run_part(options.part, settings, file)
        except Exception:
            write(file.with_suffix(".error"), traceback.format_exc()[-3000:])
            raise
        return 0
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit(
            f"torch {torch.__version__} finds no CUDA device; `--device cpu --tiny` runs the code on a CPU"
        )
    from benchmarks.gpu_table import table

    default = ROOT / ("runs/gpu" if options.device == "cpu" else "benchmarks/results")
    folder = (options.output or default).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {
        "benchmark": "gpu",
        "device": options.device,
        "tiny": options.tiny,
        "parts": {},
    }
    begin = time.perf_counter()
    left = dict.fromkeys(options.parts)
    for name in options.parts:
        remaining = 60 * options.minutes - (time.perf_counter() - begin)
        share = PARTS[name] / sum(PARTS[other] for other in left)  # what a part leaves is the others'
        del left[name]
        print(f"{name}: at most {remaining * share:.0f} s", file=sys.stderr, flush=True)
        results["parts"][name] = run_in_child(name, options, remaining * share, folder)
        results["seconds"] = time.perf_counter() - begin
        write(folder / "gpu.json", json.dumps(results, indent=1))
        write(folder / "gpu.md", table(results))
        print(f"{name}: {results['parts'][name]['status']}", file=sys.stderr, flush=True)
    print((folder / "gpu.md").read_text())
    return int(any(part["status"] != "ok" for part in results["parts"].values()))


if __name__ == "__main__":
    sys.exit(main())
