"""The command line `rlpretrain`. Its commands are in rlpretrain/commands."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from rlpretrain import __version__
from rlpretrain.commands import (
    augmenting,
    comparison,
    corpora,
    evaluation,
    installation,
    mixing,
    pages,
    preparation,
    ratios,
    serving,
    starting,
    training,
)
from rlpretrain.config import ConfigError
from rlpretrain.files import FULL, LOCKED, explain

CLOSED = ("Connection closed by peer", "Connection reset by peer")
"""What gloo says on every other rank when one has ended."""
FEATURES = (
    starting,
    training,
    serving,
    evaluation,
    comparison,
    mixing,
    ratios,
    pages,
    preparation,
    corpora,
    augmenting,
    installation,
)
"""In the order of `rlpretrain --help`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    No traceback is printed for a ConfigError (code 2), for errors whose message is complete, a full disk
    and a folder that cannot be written (1), and for Ctrl-C and SIGTERM (128 plus the signal's number).
    """
    sys.path.append(os.getcwd())  # for the user's own objectives, position functions and judges
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
        message = str(error)
        if "gloo" in message and any(words in message for words in CLOSED):
            message = "another rank has ended; its own message, if it had time for one, says why"
        elif not getattr(error, "says_all", False):
            # Set on errors whose message says what happened and what to do: no server, stale weights.
            raise
        print(f"rlpretrain: {message}", file=sys.stderr)
        return 1
    except OSError as error:
        if error.errno not in FULL and error.errno not in LOCKED:
            raise
        file = Path(error.filename) if error.filename else Path()
        subject = str(file) if error.filename else "writing failed"
        print(f"rlpretrain: {subject}: {explain(error, file)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"rlpretrain: {error if str(error) else 'interrupted'}", file=sys.stderr)
        return 128 + getattr(error, "number", signal.SIGINT)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="rlpretrain", description="Reinforcement learning as a pretraining objective."
    )
    parser.add_argument("--version", action="version", version=f"rlpretrain {__version__}")
    parser.set_defaults(takes_fields=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for feature in FEATURES:
        feature.register(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
