"""`rlpretrain corpus`."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlpretrain.commands import graph_options
from rlpretrain.commands.arguments import path, seed
from rlpretrain.config import ConfigError

DIAL_OPTIONS = ("depths", "held_out_depths")
"""Options that only the dial corpora have."""
SHARED_OPTIONS = ("mix", "base", "train", "held_out", "seed")


def register(commands: Any) -> None:
    """Add `corpus` to the command line."""
    p = commands.add_parser("corpus", help="make a controlled corpus")
    p.add_argument(
        "kind",
        choices=["dial", "dial_family", "graphs"],
        help="dial_family: in the formats of all objectives. graphs: reasoning whose every step is checked",
    )
    p.add_argument("--out", type=path, required=True, help="folder to write")
    p.add_argument(
        "--mix",
        help="composition of the base documents (b9, d1, s20, c4, c6, c7, c8; family: f1; graphs: "
        "few_thoughts, traces)",
    )
    p.add_argument("--base", type=int, help="base documents (200000; graphs: 40000)")
    p.add_argument("--train", type=int, help="documents or prompts for training (50000; graphs: 10000)")
    p.add_argument("--held-out", type=int, help="held-out documents (1200; graphs: 1600)")
    p.add_argument("--seed", type=seed)
    dial = p.add_argument_group("dial, dial_family")
    dial.add_argument("--depths", help="depths of the training problems, as 1-4 or 1,2,5 (1-4)")
    dial.add_argument("--held-out-depths", help="depths of the held-out problems (1-6)")
    graph_options.add_arguments(p)
    p.set_defaults(command=corpus)


def corpus(args: argparse.Namespace, rest: Sequence[str]) -> int:
    """`rlpretrain corpus dial --out DIR`."""
    is_graphs = args.kind == "graphs"
    for name in DIAL_OPTIONS if is_graphs else graph_options.NAMES:
        if getattr(args, name) is not None:
            raise ConfigError(f"--{name.replace('_', '-')} is not an option of the corpus {args.kind}")
    given = {name: getattr(args, name) for name in SHARED_OPTIONS if getattr(args, name) is not None}
    paths = graph_options.write(args, given) if is_graphs else _write_dial(args, given)
    for name, written in paths.items():
        print(f"{name:9} {written}")
    return 0


def _write_dial(args: argparse.Namespace, given: dict[str, Any]) -> dict[str, Path]:
    """Write a dial corpus with the options given."""
    kind = importlib.import_module(f"rlpretrain.corpora.{args.kind}")
    for name in DIAL_OPTIONS:
        if getattr(args, name) is not None:
            given[name] = graph_options.whole_numbers(getattr(args, name), "depths")
    try:
        return kind.write(args.out, **given)
    except ValueError as error:
        raise ConfigError(str(error)) from None
