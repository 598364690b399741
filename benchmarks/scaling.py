"""What saturates first: a simulation of RLP's throughput on more and more GPUs, from speeds measured on one.

    python -m benchmarks.scaling --out benchmarks/results

It is arithmetic, no measurement; docs/scale.md has the assumptions. Samplers decode the thoughts of a step
with continuous batching, trainers train on them and send the weights. GPUs either take turns (`shared`) or
are split, and then samplers are up to `staleness` steps ahead.
"""

from __future__ import annotations

import argparse
import heapq
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from rlpretrain.tracking.progress import bar
from rlpretrain.training.records import write_json

GPUS_PER_NODE = 8
TOKEN_BUDGET = 16_384  # trained tokens of a micro-batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Speeds:
    """What one GPU does for a model of Qwen3-0.6B's shape."""

    decode_s: float = 3.74e-3
    """Seconds of a decode step, without its rows."""
    decode_row_s: float = 12.3e-6
    """Seconds that each row adds. Both: vLLM on an H200, 16 and 64 rows (results/gpu_h200.json)."""
    slots: int = 256
    """Rows that an engine decodes at once."""
    trained_tokens_per_s: float = 58_571.0
    """Tokens of compiled trees, with forward and backward: an H100 (benchmarks/results/gpu.json)."""
    sync_s: float = 0.12
    """Seconds of a weight sync, as measured on one card (docs/gpu.md)."""
    weights: float = 1.19e9
    """Bytes of the weights in bfloat16."""
    node_link: float = 300e9
    """Bytes a second that a GPU receives from its node. Assumed."""
    link: float = 40e9
    """The same from other nodes. Assumed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """A step of training."""

    documents: int = 128
    document: int = 2048
    positions: int = 4
    """Per document."""
    thoughts: int = 16
    mean_length: float = 200.0
    """Of a thought; lengths are exponential up to `limit`."""
    limit: int = 1024
    target: int = 32

    @property
    def trained_tokens(self) -> float:
        """Tokens of all trees: documents once, and each thought with its target."""
        branch = self.mean_length + self.target
        return self.documents * (self.document + self.positions * self.thoughts * branch)

    def lengths(self, rng: np.random.Generator) -> np.ndarray:
        """The lengths of all thoughts of a step."""
        count = self.documents * self.positions * self.thoughts
        return np.minimum(np.ceil(rng.exponential(self.mean_length, count)), self.limit).astype(int)


@dataclass(frozen=True, slots=True)
class Course:
    """What a simulated run took."""

    step_s: float
    sampler_busy: float
    """Share of the time in which the samplers decode; of shared GPUs, the share of decoding."""
    trainer_busy: float


def decode_seconds(lengths: np.ndarray, speeds: Speeds) -> float:
    """Seconds in which one engine decodes thoughts: a free slot takes the next one at once."""
    ends = [0] * min(speeds.slots, len(lengths))
    changes: dict[int, int] = {}
    for length in lengths.tolist():
        start = heapq.heappop(ends)
        heapq.heappush(ends, start + length)
        changes[start] = changes.get(start, 0) + 1
        changes[start + length] = changes.get(start + length, 0) - 1
    times = np.array(sorted(changes))
    rows = np.cumsum([changes[time] for time in times])[:-1]
    return float(np.diff(times) @ (speeds.decode_s + speeds.decode_row_s * rows))


def sampling_seconds(lengths: np.ndarray, engines: int, speeds: Speeds) -> float:
    """Seconds until the slowest engine is done with its share of the thoughts."""
    return max(decode_seconds(lengths[first::engines], speeds) for first in range(min(engines, len(lengths))))


def training_seconds(work: Work, gpus: int, speeds: Speeds) -> float:
    """Seconds of a step of FSDP 2: products, then weights twice and gradients once, not overlapped."""
    compute = work.trained_tokens / (gpus * speeds.trained_tokens_per_s)
    if gpus == 1:
        return compute
    micro_batches = max(1, round(work.trained_tokens / gpus / TOKEN_BUDGET))
    received = micro_batches * 4 * speeds.weights * (gpus - 1) / gpus  # 2 x 2 bytes and 4 bytes a parameter
    return compute + received / (speeds.node_link if gpus <= GPUS_PER_NODE else speeds.link)


def sync_seconds(samplers: int, speeds: Speeds) -> float:
    """Seconds in which all samplers get new weights: the measured part, and one broadcast."""
    return speeds.sync_s + speeds.weights / (speeds.node_link if samplers <= GPUS_PER_NODE else speeds.link)


def simulate(
    work: Work,
    speeds: Speeds,
    *,
    samplers: int,
    trainers: int,
    staleness: int = 0,
    steps: int = 30,
    seed: int = 0,
) -> Course:
    """A run with `samplers` and `trainers` apart; with `staleness` 0 they wait for each other."""
    rng = np.random.default_rng(seed)
    train, sync = training_seconds(work, trainers, speeds), sync_seconds(samplers, speeds)
    ready = [0.0]  # when the engines have the weights after a number of steps
    sampler_free = trainer_free = decoding = 0.0
    for step in range(steps):
        seconds = sampling_seconds(work.lengths(rng), samplers, speeds)
        sampled = max(sampler_free, ready[max(0, step - staleness)]) + seconds
        trained = max(sampled, trainer_free) + train
        trainer_free = trained + sync
        ready.append(trainer_free)
        sampler_free = sampled + (sync if staleness else 0.0)  # a sync interrupts what is decoded
        decoding += seconds
    total = ready[-1]
    return Course(total / steps, decoding / total, train * steps / total)


def best_split(work: Work, speeds: Speeds, gpus: int, staleness: int) -> tuple[int, Course]:
    """The number of samplers with the fastest step, of every eighth of the GPUs."""
    shares = sorted({max(1, min(gpus - 1, round(gpus * eighth / 8))) for eighth in range(1, 8)})
    courses = {
        samplers: simulate(work, speeds, samplers=samplers, trainers=gpus - samplers, staleness=staleness)
        for samplers in shares
    }
    return min(courses.items(), key=lambda item: item[1].step_s)


def table(
    work: Work,
    speeds: Speeds,
    nodes: Sequence[int],
    staleness: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[dict[str, float]]:
    """A row for each number of nodes."""
    rows = []
    for count in nodes:
        progress(len(rows), len(nodes))
        gpus = count * GPUS_PER_NODE
        shared = simulate(work, speeds, samplers=gpus, trainers=gpus)
        samplers, split = best_split(work, speeds, gpus, staleness)
        rows.append(
            {
                "nodes": count,
                "shared_step_s": shared.step_s,
                "shared_decoding": shared.sampler_busy,
                "split_step_s": split.step_s,
                "samplers": samplers,
                "sampler_busy": split.sampler_busy,
                "trainer_busy": split.trainer_busy,
            }
        )
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Write scaling.json and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/scaling"), help="folder to write")
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--staleness", type=int, default=1)
    args = parser.parse_args(argv)
    work, speeds = Work(), Speeds()
    with bar("simulating") as progress:
        rows = table(work, speeds, args.nodes, args.staleness, progress)
    args.out.mkdir(parents=True, exist_ok=True)
    settings = {"work": asdict(work), "speeds": asdict(speeds), "staleness": args.staleness}
    write_json(args.out / "scaling.json", settings | {"rows": rows})
    for row in rows:
        print("  ".join(f"{name} {value:.3g}" for name, value in row.items()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
