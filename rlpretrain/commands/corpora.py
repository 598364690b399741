"""`rlpretrain corpus`."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from typing import Any

from rlpretrain.commands.arguments import path, seed
from rlpretrain.config import ConfigError


def register(commands: Any) -> None:
    """Add `corpus` to the command line."""
    p = commands.add_parser("corpus", help="make a controlled corpus")
    p.add_argument(
        "kind", choices=["dial", "dial_family"], help="dial_family: in the formats of all objectives"
    )
    p.add_argument("--out", type=path, required=True, help="folder to write")
    p.add_argument(
        "--mix", help="composition of the base documents (b9, d1, s20, c4, c6, c7, c8; family: f1)"
    )
    p.add_argument("--base", type=int, default=200_000, help="base documents")
    p.add_argument("--train", type=int, default=50_000, help="plain documents for reinforcement pretraining")
    p.add_argument("--held-out", type=int, default=1_200)
    p.add_argument("--depths", default="1-4", help="depths of the training problems, as 1-4 or 1,2,5")
    p.add_argument("--held-out-depths", default="1-6")
    p.add_argument("--seed", type=seed, default=0)
    p.set_defaults(command=corpus)


def corpus(args: argparse.Namespace, rest: Sequence[str]) -> int:
    """`rlpretrain corpus dial --out DIR`."""
    kind = importlib.import_module(f"rlpretrain.corpora.{args.kind}")
    mix = {"mix": args.mix} if args.mix else {}
    try:
        paths = kind.write(
            args.out,
            base=args.base,
            train=args.train,
            held_out=args.held_out,
            seed=args.seed,
            **mix,
            depths=_depths(args.depths),
            held_out_depths=_depths(args.held_out_depths),
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None
    for name, written in paths.items():
        print(f"{name:9} {written}")
    return 0


def _depths(text: str) -> list[int]:
    """`1-4` or `1,2,5` as numbers."""
    try:
        low, dash, high = text.partition("-")
        found = list(range(int(low), int(high) + 1)) if dash else [int(x) for x in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise ConfigError(f"depths are written 1-4 or 1,2,5, not '{text}'")
    return found
