"""`rlpretrain train` and `rlpretrain rollout`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlpretrain.commands.arguments import path
from rlpretrain.config import ConfigError


def register(commands: Any) -> None:
    """Add `train` and `rollout` to the command line."""
    p = commands.add_parser("train", help="train from a YAML configuration", allow_abbrev=False,
                            description="Every field can be set: --section.field value; --fields lists them all.")  # fmt: skip
    p.add_argument("config", type=path, nargs="?", help="YAML file")
    p.add_argument("--resume", nargs="?", type=path, const="auto", help="auto (the newest usable checkpoint), or its folder")
    p.add_argument("--dry-run", action="store_true", help="check everything, print memory and schedule, load no weights")
    p.add_argument("--fields", action="store_true", help="list every field with default and meaning, also of CONFIG's objective")
    p.set_defaults(command=train, takes_fields=True)

    p = commands.add_parser("rollout", help="only sample: keep the groups of every step, for train --replay", allow_abbrev=False)
    p.add_argument("config", type=path, help="YAML file; --section.field value as in train")
    p.set_defaults(command=rollout, takes_fields=True)


def train(args: argparse.Namespace, rest: Sequence[str]) -> int:
    """`rlpretrain train CONFIG.yaml [--field value ...] [--resume auto] [--dry-run]`."""
    from rlpretrain.config import io as c
    from rlpretrain.objectives import config_of

    if args.fields:
        _print_fields(c, c.load(args.config, rest, config_of).objective.get("name", "rlp") if args.config else None)
        return 0
    if not args.config:
        raise ConfigError("which configuration? rlpretrain train CONFIG.yaml (or --fields for all there is to set)")
    config = c.load(args.config, rest, config_of)
    if args.dry_run:
        from rlpretrain.dry_run import dry_run

        return dry_run(config, Path(args.config).parent)
    from rlpretrain.pretrainer import Pretrainer
    from rlpretrain.run import Diverged

    try:
        result = Pretrainer(config).train(resume=args.resume)
    except Diverged as error:
        print(f"rlpretrain: {error}", file=sys.stderr)
        return 1
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in result.items()}))
    return 0


def rollout(args: argparse.Namespace, rest: Sequence[str]) -> int:
    """`rlpretrain rollout CONFIG.yaml [--field value ...]`."""
    from rlpretrain.config import io as c
    from rlpretrain.objectives import config_of
    from rlpretrain.pretrainer import Pretrainer

    print(json.dumps(Pretrainer(c.load(args.config, rest, config_of)).rollout()))
    return 0


def _print_fields(c: Any, used: str | None) -> None:
    from rich.console import Console
    from rich.table import Table

    from rlpretrain.objectives import available, find

    table = Table("field", "default", "meaning")
    for row in c.describe(c.PretrainConfig):
        table.add_row(*row)
    for name in dict.fromkeys([*available(), *filter(None, [used])]):
        for field, default, text in c.describe(find(name).Config):
            table.add_row(f"objective.{field} ({name})", default, text)
    Console().print(table)
