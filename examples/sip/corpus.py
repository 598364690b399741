"""Worked problems of which some have a wrong step, with rewrites: the data of the sip examples.

python -m examples.sip.corpus --out runs/sip
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rlpretrain.corpora import dial_judge


def main(argv: Sequence[str] | None = None) -> int:
    """Write train.jsonl and held_out.jsonl."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--train", type=int, default=20_000, help="documents, 30%% of them wrong")
    parser.add_argument("--held-out", type=int, default=600, help="held-out documents, all right")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    written = dial_judge.write(args.out, train=args.train, held_out=args.held_out, seed=args.seed)
    for path in written.values():
        print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
