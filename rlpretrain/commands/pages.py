"""`rlpretrain report` and `rlpretrain inspect`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from rlpretrain.commands.arguments import count, objective_section, path, port, seed
from rlpretrain.config import ConfigError


def register(commands: Any) -> None:
    """Add `report` and `inspect` to the command line."""
    p = commands.add_parser(
        "report", help="a run as one HTML page: curves, warnings, thoughts and what each is worth"
    )
    p.add_argument("run", type=path, help="folder of a run")
    p.add_argument("--out", type=path, help="file to write; report.html in the run's folder by default")
    p.add_argument(
        "--step",
        type=count,
        help="step whose thoughts are shown, where the run kept them; the last by default",
    )
    p.add_argument("--documents", type=count, default=12, help="how many documents")
    p.add_argument(
        "--model", type=path, help="model that gains are computed with; the trained one by default"
    )
    p.add_argument(
        "--against", type=path, help="folder of another run, whose curves and first lines are shown too"
    )
    p.add_argument(
        "--watch",
        action="store_true",
        help="serve the page on this machine while the run trains, without thoughts; Ctrl-C ends it",
    )
    p.add_argument("--port", type=port, default=8080, help="for --watch; 0 takes a free one")
    p.add_argument("--every", type=count, default=10, help="for --watch: seconds between two looks")
    p.set_defaults(command=report)

    p = commands.add_parser(
        "inspect", help="where would thinking help this model? The same page for any checkpoint and text"
    )
    p.add_argument("model", type=path, help="hub id or folder")
    p.add_argument("--text", type=path, required=True, help="file with documents")
    p.add_argument("--out", type=path, default="inspect.html", help="file to write")
    p.add_argument(
        "--objective",
        default="{}",
        help="YAML: fields of the objective section (positions, target_length, ...)",
    )
    p.add_argument("--documents", type=count, default=12, help="how many documents")
    p.add_argument("--thoughts", type=count, default=4, help="sampled thoughts per position")
    p.add_argument("--max-thought-tokens", type=count, default=128)
    p.add_argument("--max-length", type=count, default=512, help="longest document in tokens")
    p.add_argument("--seed", type=seed, default=0)
    p.set_defaults(command=inspect)


def report(args: argparse.Namespace, rest: Sequence[str]) -> int:
    """`rlpretrain report RUN_DIR`."""
    from rlpretrain.reporting.report import report as run
    from rlpretrain.tracking.progress import bar

    if args.watch:
        return watch(args)
    with bar("sampling and scoring thoughts") as progress:
        page = run(
            args.run,
            args.out,
            step=args.step,
            documents=args.documents,
            model=args.model,
            against=args.against,
            progress=progress,
        )
    print(page)
    return 0


def watch(args: argparse.Namespace) -> int:
    """`rlpretrain report RUN_DIR --watch`."""
    from rlpretrain.reporting.watch import HOST, make_server

    if args.out or args.step or args.model:
        raise ConfigError("--watch shows no thoughts and writes no file: leave out --out, --step and --model")
    with make_server(args.run, args.port, args.every, args.against) as server:
        print(f"http://{HOST}:{server.server_port}/ until Ctrl-C", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()
    return 0


def inspect(args: argparse.Namespace, rest: Sequence[str]) -> int:
    """`rlpretrain inspect MODEL --text FILE`."""
    from rlpretrain.reporting.report import inspect as run
    from rlpretrain.tracking.progress import bar

    with bar("sampling and scoring thoughts") as progress:
        page = run(
            args.model,
            args.text,
            args.out,
            objective=objective_section(args.objective),
            documents=args.documents,
            thoughts=args.thoughts,
            max_thought_tokens=args.max_thought_tokens,
            max_length=args.max_length,
            seed=args.seed,
            progress=progress,
        )
    print(page)
    return 0
