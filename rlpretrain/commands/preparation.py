"""`rlpretrain prepare` and `rlpretrain tag`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlpretrain.commands.arguments import count, objective_section, path, seed
from rlpretrain.config import ConfigError


def register(commands: Any) -> None:
    """Add `prepare` and `tag` to the command line."""
    p = commands.add_parser(
        "prepare",
        help="write what `trl grpo` reads: a checkpoint with the thought tags, and prompts",
        description="Writes OUT/model and OUT/prompts; docs/trl.md has the rest.",
    )
    p.add_argument("model", type=path, help="hub id or folder")
    p.add_argument("--out", type=path, required=True, help="folder to write")
    p.add_argument("--data", type=path, required=True, help="documents to train on")
    p.add_argument("--held-out", type=path, help="documents to evaluate on: the split test")
    p.add_argument(
        "--objective",
        default="{name: rlp}",
        help="YAML: the objective section (where to think, how far to predict)",
    )
    p.add_argument("--column", default="text", help="column with the text")
    p.add_argument("--max-length", type=count, default=2048, help="longest document in tokens")
    p.add_argument("--epochs", type=count, default=1, help="how often each document is given new positions")
    p.add_argument(
        "--dtype",
        default="float32",
        choices=["float32", "bfloat16", "float16"],
        help="of the written weights",
    )
    p.add_argument("--revision", help="branch, tag or commit on the hub")
    p.add_argument("--trust-remote-code", action="store_true")
    p.add_argument("--seed", type=seed, default=0)
    p.set_defaults(command=prepare)

    p = commands.add_parser(
        "tag",
        help="a base checkpoint that knows the tags of a thought: what servers and trainer begin with",
        description="Writes OUT, an ordinary checkpoint folder.",
    )
    p.add_argument("model", type=path, help="hub id or folder")
    p.add_argument("--out", type=path, required=True, help="folder to write")
    p.add_argument(
        "--objective",
        default="{name: rlp}",
        help="the objective section (its tags), or a YAML file that has it",
    )
    p.add_argument(
        "--dtype",
        default="float32",
        choices=["float32", "bfloat16", "float16"],
        help="of the written weights",
    )
    p.add_argument("--revision", help="branch, tag or commit on the hub")
    p.add_argument("--trust-remote-code", action="store_true")
    p.add_argument("--seed", type=seed, default=0)
    p.set_defaults(command=tag)


def prepare(args: argparse.Namespace, rest: Sequence[str]) -> int:
    """`rlpretrain prepare MODEL --out DIR --data FILE`."""
    from rlpretrain.config import ModelConfig
    from rlpretrain.trl.prepared import prepare as run

    model = ModelConfig(
        path=args.model, revision=args.revision, dtype=args.dtype, trust_remote_code=args.trust_remote_code
    )
    documents = {"train": args.data} | ({"test": args.held_out} if args.held_out else {})
    found = run(
        model,
        args.out,
        objective_section(args.objective),
        documents,
        column=args.column,
        max_length=args.max_length,
        epochs=args.epochs,
        seed=args.seed,
    )
    added = found.pop("added")
    print(f"model    {Path(args.out) / 'model'}" + (f", new to it: {', '.join(added)}" if added else ""))
    print(
        f"prompts  {Path(args.out) / 'prompts'}, " + ", ".join(f"{split}: {n}" for split, n in found.items())
    )
    return 0


def tag(args: argparse.Namespace, rest: Sequence[str]) -> int:
    """`rlpretrain tag MODEL --out DIR`."""
    from rlpretrain import models
    from rlpretrain.config import ModelConfig
    from rlpretrain.objectives import thought_tags

    out = Path(args.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out} exists already: remove it, or choose another folder")
    section = objective_section(args.objective)
    if (tags := thought_tags(section)) is None:
        raise ConfigError(f"objective {section['name']} has no thoughts, so no tags")
    config = ModelConfig(
        path=args.model, revision=args.revision, dtype=args.dtype, trust_remote_code=args.trust_remote_code
    )
    model, tokenizer, added = models.load_with_tokenizer(config, tags, args.seed)
    models.save_start(model, tokenizer, out)
    print(
        f"{out}: "
        + (
            f"new to it: {', '.join(added)}"
            if added
            else f"a copy, it knew {tags.open} and {tags.close} already"
        )
    )
    return 0
