"""Documents of unequal quality: traces of the dial corpus in which a share of the steps is wrong.

A row is a document and its quality, 0, .1, ... or 1: {"text": "ann has 6 bob up3 9 .", "quality": 0.4}. A
step is wrong with probability (1 - quality) / 2: half of the wrong ones take another operation, the others
have a wrong result, and the next step builds on it. In a chain, which has no question, another operation is
as good. The held-out documents have no wrong step.

    python -m examples.mixtures.quality --out runs/quality
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from rlpretrain.corpora.dial_formats import Mix, base_documents
from rlpretrain.corpora.writing import save_rows

TRACES = {"prose": 0.0, "chain": 0.3, "worked": 0.7, "think": 0.0, "plain": 0.0}
"""Shares of the dial corpus's formats: those with a trace alone."""
BEST = 0.9
"""Documents of this quality and more are a file of their own: two elevenths of all."""


def main(argv: Sequence[str] | None = None) -> int:
    """Write all.jsonl, best.jsonl and held_out.jsonl."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--train", type=int, default=25_600, help="documents to train on")
    parser.add_argument("--held-out", type=int, default=400, help="held-out documents")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    rows = list(islice(documents(args.seed), args.train))
    held_out = base_documents(args.held_out, args.seed + 1, Mix(**TRACES, slip=0.0))
    files: dict[str, Iterator[dict[str, Any]]] = {
        "all": iter(rows),
        "best": (row for row in rows if row["quality"] >= BEST),
        "held_out": ({"text": text, "quality": 1.0} for text in held_out),
    }
    for path in save_rows(args.out, files).values():
        print(path)
    return 0


def documents(seed: int) -> Iterator[dict[str, Any]]:
    """Rows without end, of all qualities alike."""
    rng = random.Random(f"quality {seed}")
    while True:
        quality = rng.randrange(11) / 10
        mix = Mix(**TRACES, slip=(1 - quality) / 2)
        (text,) = base_documents(1, rng.getrandbits(32), mix)
        yield {"text": text, "quality": quality}


if __name__ == "__main__":
    raise SystemExit(main())
