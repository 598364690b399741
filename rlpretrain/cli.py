"""`rlpretrain`: train, rollout, serve, eval, compare, report, inspect, prepare, tag, corpus, doctor, metrics."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from rlpretrain import __version__
from rlpretrain.commands import comparison, corpora, evaluation, installation, pages, preparation, serving, training
from rlpretrain.config import ConfigError

FEATURES = (training, serving, evaluation, comparison, pages, preparation, corpora, installation)
"""In the order in which `rlpretrain --help` lists their commands."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. A ConfigError ends with its message and exit code 2, other errors that say all with 1: no traceback."""
    sys.path.append(os.getcwd())  # objectives, position functions and judges of the user's own, as TRL's command line has it
    parser = make_parser()
    args, rest = parser.parse_known_args(argv)
    if rest and not args.takes_fields:
        parser.error(f"unknown arguments: {' '.join(rest)}")
    try:
        return args.command(args, rest) or 0
    except (ConfigError, ImportError) as error:
        print(f"rlpretrain: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if not getattr(error, "says_all", False):  # no server, stale weights: what happened and what to do is in the message
            raise
        print(f"rlpretrain: {error}", file=sys.stderr)
        return 1


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="rlpretrain", description="Reinforcement learning as a pretraining objective.")
    parser.add_argument("--version", action="version", version=f"rlpretrain {__version__}")
    parser.set_defaults(takes_fields=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for feature in FEATURES:
        feature.register(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
