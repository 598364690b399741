"""The options of `rlpretrain corpus graphs`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rlpretrain.config import ConfigError

NAMES = (
    "surface",
    "ops",
    "weights",
    "contexts",
    "train_contexts",
    "distractors",
    "order",
    "slip",
    "layers",
    "mid",
    "mid_ops",
    "train_ops",
    "held_out_ops",
)
"""Options that only this corpus has; they are fields of its `Settings`."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options; the defaults are those of `Settings`."""
    group = parser.add_argument_group("graphs")
    group.add_argument("--surface", help="words (one token a word, with a tokenizer), or sentences (English)")
    group.add_argument("--ops", help="numbers of operations of the base documents, as 1-6 or 1,2,5 (1-6)")
    group.add_argument("--weights", help="the share of each of --ops in the base (25,25,25,19,4,2)")
    group.add_argument("--contexts", help="the share of each context in the base (A:.9,B:.1)")
    group.add_argument("--train-contexts", help="the same in the mid-training and RL sets (--contexts)")
    group.add_argument("--distractors", help="quantities that the query does not need, a range (0-2)")
    group.add_argument("--order", help="order of the sentences: topological or shuffled (topological)")
    group.add_argument("--slip", type=float, help="share of wrong steps in the base's traces (0)")
    group.add_argument("--layers", type=int, help="layers of the model's configuration (2)")
    group.add_argument("--mid", type=int, help="documents for mid-training (5000)")
    group.add_argument("--mid-ops", help="their numbers of operations (5,6)")
    group.add_argument("--train-ops", help="numbers of operations of the RL prompts (5,6)")
    group.add_argument("--held-out-ops", help="numbers of operations of the held-out problems (1-8)")


def write(args: argparse.Namespace, given: dict[str, Any]) -> dict[str, Path]:
    """Write the corpus with the options given, and a progress bar; `given` are the shared ones."""
    from rlpretrain.corpora.graphs import Settings
    from rlpretrain.corpora.graphs import write as write_corpus
    from rlpretrain.tracking.progress import bar

    options = given | {name: getattr(args, name) for name in NAMES if getattr(args, name) is not None}
    for name in ("ops", "mid_ops", "train_ops", "held_out_ops"):
        if name in options:
            options[name] = tuple(whole_numbers(options[name], name.replace("_", "-")))
    if "weights" in options:
        options["weights"] = tuple(_number(text, "weights") for text in options["weights"].split(","))
    for name in ("contexts", "train_contexts"):
        if name in options:
            options[name] = _shares(options[name], name.replace("_", "-"))
    if "distractors" in options:
        options["distractors"] = _range(options["distractors"])
    with bar("writing documents") as progress:
        return write_corpus(args.out, Settings(**options), progress)


def whole_numbers(text: str, name: str) -> list[int]:
    """`1-4` or `1,2,5` as numbers from 1 on."""
    try:
        low, dash, high = text.partition("-")
        numbers = list(range(int(low), int(high) + 1)) if dash else [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise ConfigError(f"{name} are written 1-4 or 1,2,5, not '{text}'")
    return numbers


def _range(text: str) -> tuple[int, int]:
    """`0-2` or `1` as the fewest and the most."""
    low, dash, high = text.partition("-")
    try:
        return int(low), int(high if dash else low)
    except ValueError:
        raise ConfigError(f"distractors are written 0-2 or 1, not '{text}'") from None


def _number(text: str, name: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{name}: '{text}' is not a number") from None


def _shares(text: str, name: str) -> dict[str, float]:
    """`A:.9,B:.1` as a mapping."""
    shares: dict[str, float] = {}
    for part in text.split(","):
        context, colon, share = part.strip().partition(":")
        if not colon or context in shares:
            raise ConfigError(f"{name} are written A:.9,B:.1, each context once, not '{text}'")
        shares[context] = _number(share, name)
    return shares
