"""`rlpretrain init`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlpretrain.commands.arguments import amount, count, path
from rlpretrain.config import ConfigError
from rlpretrain.files import writing


def register(commands: Any) -> None:
    """Add `init` to the command line."""
    p = commands.add_parser(
        "init",
        help="write a commented configuration for a model, documents and this machine",
        description="Writes OUT, a YAML file that `rlpretrain train` runs. In a terminal it asks for MODEL "
        "and DATA where they are missing. Fields of the configuration may follow, as for `train`: "
        "--data.name main --reference.path MODEL",
    )
    p.add_argument("model", type=path, nargs="?", help="hub id or folder of a base checkpoint")
    p.add_argument("data", type=path, nargs="?", help="documents: a file, folder, glob or hub id")
    p.add_argument("--out", type=path, default="rlp.yaml", help="file to write (default: rlp.yaml)")
    p.add_argument("--objective", default="rlp", help="its name (default: rlp)")
    p.add_argument("--column", help="column with the text (default: text, or the usual names)")
    p.add_argument("--answer-column", help="column with the answer to the prompt")
    p.add_argument("--held-out", type=path, help="documents to evaluate on")
    p.add_argument("--output-dir", type=path, default="runs/first", help="folder of the run")
    p.add_argument("--device", choices=["cpu", "cuda"], help="by default what this machine has")
    p.add_argument("--gib", type=amount, help="memory of one GPU in GiB, or of the machine")
    p.add_argument("--processes", type=count, default=1, help="GPUs, or processes on a CPU (default: 1)")
    p.add_argument("--steps", type=count, help="optimizer steps")
    p.set_defaults(command=init, takes_fields=True)


def init(args: argparse.Namespace, rest: Sequence[str]) -> int:
    """`rlpretrain init MODEL DATA --out FILE`."""
    out = Path(args.out)
    if out.exists():
        raise ConfigError(f"--out {out} exists already: remove it, or choose another name")
    model = args.model or _ask("base checkpoint (hub id or folder)", "MODEL")
    data = args.data or _ask("documents (file, folder, glob or hub id)", "DATA")

    from rlpretrain.config.io import apply_overrides
    from rlpretrain.tools.commented import as_yaml
    from rlpretrain.tools.first_config import make_first_config
    from rlpretrain.tools.first_data import Request

    first = make_first_config(
        Request(
            model=model,
            data=data,
            objective=args.objective,
            column=args.column,
            answer_column=args.answer_column,
            held_out=args.held_out,
            output_dir=args.output_dir,
            device=args.device,
            gib=args.gib,
            processes=args.processes,
            steps=args.steps,
            fields=apply_overrides({}, rest),
        )
    )
    text = as_yaml(first)
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        work = out.with_name(f".{out.name}.tmp")
        work.write_text(text, encoding="utf-8")
        work.replace(out)
    print(text)
    for note in first.notes:
        print(f"note: {note}")
    start = "rlpretrain train"
    if args.processes > 1:
        start = f"torchrun --nproc-per-node {args.processes} -m rlpretrain.cli train"
    print(f"{out} is written. Next:")
    print(f"  rlpretrain train {out} --dry-run   # memory, schedule and all checks, without weights")
    print(f"  {start} {out}")
    print(f"  rlpretrain report {args.output_dir}")
    return 0


def _ask(question: str, argument: str) -> str:
    """An answer from the terminal; ConfigError where there is none."""
    if sys.stdin.isatty() and (answer := input(f"{question}: ").strip()):
        return path(answer)
    raise ConfigError(f"init needs {argument}, the {question}: rlpretrain init MODEL DATA")
