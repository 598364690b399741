"""`rlpretrain train` and `rlpretrain rollout`."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlpretrain.commands.arguments import path
from rlpretrain.config import ConfigError


def register(commands: Any) -> None:
    """Add `train` and `rollout` to the command line."""
    p = commands.add_parser(
        "train",
        help="train from a YAML configuration",
        allow_abbrev=False,
        description="Every field can be set: --section.field value; --fields lists them all.",
    )
    p.add_argument("config", type=path, nargs="?", help="YAML file")
    p.add_argument(
        "--resume",
        nargs="?",
        type=path,
        const="auto",
        help="auto (the newest usable checkpoint), or its folder",
    )
    p.add_argument(
        "--dry-run", action="store_true", help="check everything, print memory and schedule, load no weights"
    )
    p.add_argument(
        "--fields",
        nargs="?",
        const="",
        metavar="SECTION",
        help="list every field, a section's or those with a word, and what they mean; CONFIG's objective too",
    )
    p.set_defaults(command=train, takes_fields=True)

    p = commands.add_parser(
        "rollout", help="only sample: keep the groups of every step, for train --replay", allow_abbrev=False
    )
    p.add_argument("config", type=path, help="YAML file; --section.field value as in train")
    p.set_defaults(command=rollout, takes_fields=True)


def train(args: argparse.Namespace, rest: Sequence[str]) -> int:
    """`rlpretrain train CONFIG.yaml [--field value ...] [--resume auto] [--dry-run]`."""
    from rlpretrain.config import io as c
    from rlpretrain.objectives import config_of

    if args.fields is not None:
        if Path(args.fields).suffix in (".yaml", ".yml"):  # --fields CONFIG.yaml
            args.config, args.fields = args.fields, ""
        from rlpretrain.commands.fields import print_fields

        print_fields(
            args.fields,
            c.load(args.config, rest, config_of).objective.get("name", "rlp") if args.config else None,
        )
        return 0
    if not args.config:
        raise ConfigError(
            "which configuration? rlpretrain train CONFIG.yaml (or --fields for all there is to set)"
        )
    config = c.load(args.config, rest, config_of)
    if args.dry_run:
        from rlpretrain.tools.dry_run import dry_run

        return dry_run(config, Path(args.config).parent)
    from rlpretrain.training.interruption import Interrupted
    from rlpretrain.training.pretrainer import Pretrainer
    from rlpretrain.training.run import Diverged

    try:
        result = Pretrainer(config).train(resume=args.resume)
    except Interrupted as error:
        command = shlex.join(["rlpretrain", "train", args.config, *rest, "--resume", "auto"])
        raise Interrupted(f"{error}: {command}", error.number) from None
    except KeyboardInterrupt:
        raise KeyboardInterrupt("stopped at once; --resume auto goes on from the newest checkpoint") from None
    except Diverged as error:
        print(f"rlpretrain: {error}", file=sys.stderr)
        return 1
    if os.environ.get("RANK", "0") == "0":
        _end(config.output_dir, result, f"{_trained(result)}; model: {result['model']}")
    return 0


def rollout(args: argparse.Namespace, rest: Sequence[str]) -> int:
    """`rlpretrain rollout CONFIG.yaml [--field value ...]`."""
    from rlpretrain.config import io as c
    from rlpretrain.objectives import config_of
    from rlpretrain.training.pretrainer import Pretrainer

    config = c.load(args.config, rest, config_of)
    result = Pretrainer(config).rollout()
    kept = f"{result['steps']} steps, {result['groups']} groups"
    _end(config.output_dir, result, f"{kept}; train on them: --replay {config.output_dir}")
    return 0


def _end(folder: str, result: dict[str, Any], summary: str) -> None:
    """Write the numbers of a run to result.json, and print the last line."""
    from rlpretrain.training.records import write_json

    file = Path(folder) / "result.json"
    write_json(file, {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in result.items()})
    print(f"{summary}; numbers: {file}", flush=True)


def _trained(result: dict[str, Any]) -> str:
    """Steps, and the gain: held-out if there is one, else against the frozen model, else the current one."""
    summary = f"{result['steps']} steps" + (f" (stopped: {result['stopped']})" if result["stopped"] else "")
    gains = {
        "eval/gain_frozen": "held-out gain",
        "ig/frozen": "gain",
        "ig/self": "gain",
        "ntp/trained_loss": "next-token loss of the trained tokens",
        "ntp/loss": "next-token loss",
    }
    name = next((name for name in gains if name in result), None)
    skipped = result.get("run/skipped_steps")
    summary += f" ({skipped:.0f} skipped: NaN or inf)" if skipped else ""
    return summary + (f", {gains[name]} {result[name]:.3f} nats" if name else "")
