"""The time of a demo RLP step by part: rollout, scoring and update, in trees and in padded rows, in turns.

    python -m benchmarks.demo_step [--rounds 3] [--json]

A freshly initialised model of the demo's size on dial documents, 16 positions × 8 thoughts, one thread;
medians over steps. Thoughts of this untrained model are cut at 10 tokens, the mean length of trained ones.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    rounds = [
        {packing: measure(args.steps, packing) for packing in ("tree", "padded")} for _ in range(args.rounds)
    ]
    result = {
        packing: {name: statistics.median(r[packing][name] for r in rounds) for name in rounds[0][packing]}
        for packing in ("tree", "padded")
    }
    for what in ("training", "step"):
        name = f"seconds of {what}"
        result[f"ratio of {what}"] = statistics.median(r["padded"][name] / r["tree"][name] for r in rounds)
    print(json.dumps(result) if args.json else json.dumps(result, indent=1))


def measure(steps: int, packing: str) -> dict[str, float]:
    """Median seconds of each part, and its share of the step; training is all but the rollout."""
    from rlpretrain.config.io import build
    from rlpretrain.corpora import dial
    from rlpretrain.training.loop import train
    from rlpretrain.training.run import Run

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        paths = dial.write(folder, base=10, train=4000, held_out=12)
        values = {
            "model": {"path": str(paths["model"]), "from_scratch": True},
            "data": {"path": str(paths["train"])},
            "objective": {"name": "rlp", "positions": "after", "marker": "shows"},
            "positions_per_step": 16,
            "sampling": {"thoughts": 8, "max_thought_tokens": 10, "cut": "force_close"},
            "max_steps": steps,
            "baseline": {"name": "self", "frozen_every": 0},
            "checkpoint": {"every": 0},
            "stop": {"collapse": False},
            "packing": packing,
            "policy": {"backend": "torch"},
            "console": False,
            "device": "cpu",
            "output_dir": str(Path(folder) / "run"),
        }
        run = Run(build(values), None)
        parts: dict[str, list[float]] = {}
        for name, owner, method in (
            ("rollout", run, "take"),
            ("pack", run, "pack"),
            ("score (forward)", run.policy, "score"),
            ("backward", run.policy, "backward"),
            ("optimizer step", run, "update"),
            ("observe", run, "observe"),
        ):
            parts[name] = clock(owner, method)
        train(run)
        run.close()
    median = {name: statistics.median(times[3:]) for name, times in parts.items()}
    total = sum(median.values())
    out = {"seconds of step": total, "seconds of training": total - median["rollout"]}
    return (
        out
        | {f"{name} s": value for name, value in median.items()}
        | {f"{n} share": v / total for n, v in median.items()}
    )


def clock(owner: object, method: str) -> list[float]:
    """Seconds of every call of a method, from now on."""
    times: list[float] = []
    call = getattr(owner, method)

    def timed(*args, **kwargs):
        begin = time.perf_counter()
        out = call(*args, **kwargs)
        times.append(time.perf_counter() - begin)
        return out

    setattr(owner, method, timed)
    return times


if __name__ == "__main__":
    main()
