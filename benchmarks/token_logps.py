"""`token_logps` against full logits: time and memory of forward and backward, as ratios.

    python -m benchmarks.token_logps [--rows 4096 --vocabulary 151936 --hidden 1024 --repeats 5] [--json]

Each run is a fresh process; the two versions alternate, so that other work on the machine affects both.

- *seconds*: wall clock of one forward and one backward (the first of the process, after a warm-up on a small
  head).
- *memory*: the process's peak resident size (VmHWM) − its resident size with library and inputs loaded
  (VmRSS) − the bytes of the inputs' gradients. The rest is what the method itself needed.
- *difference*: the largest absolute difference of log-probs and of gradients (the latter relative to the
  largest entry), both versions in one process, at a size that takes seconds.

The full version is ``(hidden @ W.T).float().log_softmax(-1).gather(-1, labels)``.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

import torch
from torch import Tensor

from benchmarks.process_memory import memory_field
from rewards import token_logps

GOALS = {"memory_ratio": 0.05, "time_ratio": 1.4, "difference": 1e-5}


def full_logps(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return (hidden @ weight.T).float().log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


VERSIONS = {"full": full_logps, "chunked": token_logps}


def main() -> None:
    args = _arguments()
    if args.version:
        print(json.dumps(measure(args)))
        return
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in VERSIONS}
    for repeat in range(args.repeats):
        for name in sorted(VERSIONS, reverse=bool(repeat % 2)):
            runs[name].append(_fresh_process(name, args))
            if not args.json:
                print(
                    f"{repeat + 1}/{args.repeats} {name:8s} {runs[name][-1]['seconds']:7.2f} s "
                    f"{runs[name][-1]['memory_mb']:8.0f} MB",
                    flush=True,
                )
    result: dict[str, object] = {
        "rows": args.rows,
        "vocabulary": args.vocabulary,
        "hidden": args.hidden,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "repeats": args.repeats,
    }
    medians = {
        name: {key: statistics.median(run[key] for run in runs[name]) for key in runs[name][0]}
        for name in runs
    }
    for name, median in medians.items():
        result |= {
            f"{name}_seconds": round(median["seconds"], 3),
            f"{name}_memory_mb": round(median["memory_mb"], 1),
            f"{name}_all_seconds": [round(run["seconds"], 2) for run in runs[name]],
        }
    result |= {
        "time_ratio": round(medians["chunked"]["seconds"] / medians["full"]["seconds"], 4),
        "memory_ratio": round(medians["chunked"]["memory_mb"] / medians["full"]["memory_mb"], 4),
    }
    result |= differences(args)
    if args.json:
        print(json.dumps(result))
        return
    print(f"time   {result['time_ratio']} × full (goal ≤ {GOALS['time_ratio']})")
    print(f"memory {result['memory_ratio']} × full (goal ≤ {GOALS['memory_ratio']})")
    print(
        f"logps differ by {result['logps_difference']:.1e}, gradients by {result['gradient_difference']:.1e} "
        f"(goal ≤ {GOALS['difference']})"
    )


def measure(args: argparse.Namespace) -> dict[str, float]:
    """One forward and backward in this process, which should be fresh."""
    method = VERSIONS[args.version]
    small = _inputs(64, 512, args.hidden)
    method(*small).sum().backward()  # loads kernels and starts threads: part of the loaded state
    hidden, weight, labels = _inputs(args.rows, args.vocabulary, args.hidden)
    gradients = hidden.nbytes + weight.nbytes
    loaded = memory_field("VmRSS")
    start = time.perf_counter()
    method(hidden, weight, labels).mean().backward()
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "memory_mb": (memory_field("VmHWM") - loaded - gradients) / 2**20}


def differences(args: argparse.Namespace) -> dict[str, float]:
    """Largest differences of the two versions on the full vocabulary and 256 rows."""
    results = []
    for method in VERSIONS.values():
        hidden, weight, labels = _inputs(256, args.vocabulary, args.hidden)
        logps = method(hidden, weight, labels)
        results.append((logps.detach(), *torch.autograd.grad(logps.mean(), (hidden, weight))))
    gaps = [float((a - b).abs().max()) for a, b in zip(*results, strict=True)]
    sizes = [float(a.abs().max()) for a in results[0]]
    return {"logps_difference": gaps[0], "gradient_difference": max(gaps[1] / sizes[1], gaps[2] / sizes[2])}


def _inputs(rows: int, vocabulary: int, hidden_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of a standard deviation of about 2, filled in place so that no temporary raises the peak."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.empty(rows, hidden_size).normal_(generator=generator)
    weight = torch.empty(vocabulary, hidden_size).normal_(std=2 * hidden_size**-0.5, generator=generator)
    labels = torch.randint(vocabulary, (rows,), generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(), labels


def _fresh_process(name: str, args: argparse.Namespace) -> dict[str, float]:
    command = [
        sys.executable,
        "-m",
        "benchmarks.token_logps",
        "--version",
        name,
        "--rows",
        str(args.rows),
        "--vocabulary",
        str(args.vocabulary),
        "--hidden",
        str(args.hidden),
    ]
    return json.loads(
        subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--version", choices=sorted(VERSIONS), help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
