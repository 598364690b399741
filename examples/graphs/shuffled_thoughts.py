"""The control of generated thoughts: each document gets the thought of the next one with a thought.

    python -m examples.graphs.shuffled_thoughts thoughts.jsonl shuffled.jsonl

Rows without a thought are left out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlpretrain.corpora.writing import save_rows


def main(argv: Sequence[str] | None = None) -> int:
    """Write the rows of `rlpretrain augment` that have a thought, with exchanged thoughts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("thoughts", type=Path, help="output of rlpretrain augment with one thought a row")
    parser.add_argument("out", type=Path, help="JSONL file to write")
    args = parser.parse_args(argv)
    rows = [row for row in map(json.loads, args.thoughts.read_text().splitlines()) if row["thoughts"]]
    save_rows(args.out.parent, {args.out.stem: list(exchange(rows))})
    print(args.out)
    return 0


def exchange(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The texts with the thought of the next row, in place of their own."""
    out = []
    for row, other in zip(rows, [*rows[1:], *rows[:1]], strict=True):
        (own,), (foreign,) = row["thoughts"], other["thoughts"]
        if row["text"].count(own["text"]) != 1:
            raise SystemExit(f"row {row['row']}: its thought is not exactly once in its text")
        out.append({"text": row["text"].replace(own["text"], foreign["text"]), "row": row["row"]})
    return out


if __name__ == "__main__":
    raise SystemExit(main())
