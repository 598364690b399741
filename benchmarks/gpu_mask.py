"""The tree's block mask at 64k tokens: seconds and memory, beside torch's from every pair.

    python -m benchmarks.gpu_mask [--json]

Both are made on a CPU, with one thread. Memory is the peak that the computation adds to this process, in a
process of its own for each row.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

TREES: dict[str, tuple[int, int, int, int, int]] = {
    "4 documents of 4,096 tokens, 176 thoughts of 272": (4, 4096, 4, 11, 272),
    "a document of 16,384 tokens, 64 thoughts of 760": (1, 16384, 4, 16, 760),
    "a document of 16,384 tokens, 7,952 thoughts of 6": (1, 16384, 497, 16, 6),
    "a document of 2,048 tokens, 64 thoughts of 96": (1, 2048, 4, 16, 96),
}
"""Documents, their tokens, positions, thoughts, tokens of a thought."""


def measure(name: str, window: int | None, torchs: bool) -> dict[str, Any]:
    """One mask, in this process."""
    from torch.nn.attention.flex_attention import create_block_mask

    from benchmarks.process_memory import PeakMemory
    from rlpretrain.scoring.attention.blocks import walk
    from rlpretrain.scoring.attention.flex import mask_of, padded_size
    from rlpretrain.tree import grow

    torch.set_num_threads(1)
    documents, length, positions, thoughts, thought = TREES[name]
    rng, rows = np.random.default_rng(0), []
    for _ in range(documents):
        ids = rng.integers(1000, size=length)
        rows.append(ids)
        for at in np.linspace(length // 8, length - 8, positions).astype(int):
            rows += [np.concatenate([ids[:at], rng.integers(1000, size=thought)]) for _ in range(thoughts)]
    tree = grow(rows).tree
    padded, device = padded_size(tree.size), torch.device("cpu")
    mask_of(grow([list(range(300))]).tree, 384, None, device)  # imports
    peak = PeakMemory()
    peak.start()
    begin = time.perf_counter()
    if torchs:
        enter, leave = (torch.from_numpy(np.pad(x, (0, padded - tree.size))) for x in walk(tree))
        made: Any = create_block_mask(
            lambda b, h, i, j: (enter[j] <= enter[i]) & (enter[i] < leave[j]),
            None,
            None,
            padded,
            padded,
            "cpu",
        )
    else:
        made = mask_of(tree, padded, window, device)
    seconds = time.perf_counter() - begin
    blocks = (padded // 128) ** 2
    return {
        "tokens": tree.size,
        "seconds": seconds,
        "mib": peak.growth() / 2**20,
        "full": int(made.full_kv_num_blocks.sum()) / blocks,
        "partial": int(made.kv_num_blocks.sum()) / blocks,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="The tree's block mask: seconds and memory.")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.one:
        return print(json.dumps(measure(*json.loads(options.one))))
    rows = []
    tasks = [(name, window, False) for name in list(TREES)[:3] for window in (None, 4096)]
    tasks += [(list(TREES)[3], None, torchs) for torchs in (False, True)]
    for task in tasks:
        command = [sys.executable, "-m", "benchmarks.gpu_mask", "--one", json.dumps(task)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        name, window, torchs = task
        row = {"tree": name, "window": window, "by": "torch" if torchs else "segments"}
        rows.append(row | json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1], file=sys.stderr, flush=True)
    print(
        json.dumps(
            {"benchmark": "gpu_mask", "torch": torch.__version__, "rows": rows},
            indent=None if options.json else 1,
        )
    )


if __name__ == "__main__":
    main()
