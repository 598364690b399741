"""Three sources for online mixing: dial's problems with their answers, of depth 1, 2 and 3.

A row is a prompt with an answer: {"question": "ann has 5 bob up1 cat up1 shows", "answer": "7 ."}.

    python -m examples.mixtures.depths --out runs/mixing
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from rlpretrain.corpora import dial
from rlpretrain.corpora.writing import save_rows

DEPTHS = (1, 2, 3)


def main(argv: Sequence[str] | None = None) -> int:
    """Write depthD.jsonl and held_depthD.jsonl for each depth D."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--train", type=int, default=20_000, help="documents of each source")
    parser.add_argument("--held-out", type=int, default=300, help="held-out documents of each source")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    for depth in DEPTHS:
        held_out, training = dial.split_problems(args.train, args.held_out, args.seed, [depth], [depth])
        files = {f"depth{depth}": documents(training), f"held_depth{depth}": documents(iter(held_out))}
        for path in save_rows(args.out, files).values():
            print(path)
    return 0


def documents(problems: Iterator[dial.Problem]) -> Iterator[dict[str, str]]:
    """The rows of a source."""
    for problem in problems:
        yield {"question": " ".join([*problem.question(), "shows"]), "answer": f"{problem.answer} ."}


if __name__ == "__main__":
    raise SystemExit(main())
