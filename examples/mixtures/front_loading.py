"""The dial corpus in two files: plain documents, and documents with traces, so that a run can read either.

plain.jsonl has prose and problems with their answers; traces.jsonl has chains, worked problems and thoughts.
`rlpretrain corpus dial` makes the model, the tokenizer and the held-out problems.

    rlpretrain corpus dial --out runs/front_loading/dial
    python -m examples.mixtures.front_loading --out runs/front_loading
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from rlpretrain.corpora.dial_formats import MIXES, base_documents
from rlpretrain.corpora.writing import save_rows

MIX = MIXES["c8"]
PLAIN = ("prose", "plain")
TRACES = ("chain", "worked", "think")


def main(argv: Sequence[str] | None = None) -> int:
    """Write both files, and held-out documents of both."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--train", type=int, default=100_000, help="documents of each file")
    parser.add_argument("--held-out", type=int, default=400, help="held-out documents of each file")
    args = parser.parse_args(argv)
    files = {}
    for name, formats in (("plain", PLAIN), ("traces", TRACES)):
        files[name] = documents(formats, args.train, seed=0)
        files[f"held_{name}"] = documents(formats, args.held_out, seed=1)
    for path in save_rows(args.out, files).values():
        print(path)
    return 0


def documents(formats: Sequence[str], count: int, seed: int) -> Iterator[dict[str, str]]:
    """Documents of some formats, with the shares that these have among each other in the mix."""
    others = {name: 0.0 for name in (*PLAIN, *TRACES) if name not in formats}
    for text in base_documents(count, seed, replace(MIX, **others)):
        yield {"text": text}


if __name__ == "__main__":
    raise SystemExit(main())
