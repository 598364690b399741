"""`rlpretrain mix`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlpretrain.commands.arguments import count, path


def register(commands: Any) -> None:
    """Add `mix` to the command line."""
    p = commands.add_parser(
        "mix",
        help="learn between which sources training carries over: the edges of Skill-It",
        allow_abbrev=False,
        description="Trains on each source for a few steps, and writes how far all held-out losses fall. "
        "An interrupted command goes on where it stopped. Fields of the file are set as in train: "
        "--section.field value.",
    )
    p.add_argument("what", choices=["edges"], help="edges: for data.mixing.edges")
    p.add_argument(
        "config", type=path, help="YAML file of the run, with data.sources and eval.data by source"
    )
    p.add_argument("--steps", type=count, required=True, help="steps of each short run")
    p.add_argument("--out", type=path, required=True, help="JSON file to write")
    p.add_argument(
        "--pairs", action="store_true", help="train on each pair of sources too, against each alone"
    )
    p.add_argument(
        "--seeds",
        type=count,
        default=1,
        help="times that each short run is done, from the file's seed on; several give intervals",
    )
    p.add_argument("--dry-run", action="store_true", help="list the short runs, and train nothing")
    p.set_defaults(command=mix, takes_fields=True)


def mix(args: argparse.Namespace, rest: Sequence[str]) -> int:
    """`rlpretrain mix edges CONFIG.yaml --steps N --out FILE [--field value ...]`."""
    from rich.table import Table

    from rlpretrain.config.io import load_config
    from rlpretrain.experiments.edges import check_out, learn_edges, plan
    from rlpretrain.objectives import config_of
    from rlpretrain.tracking.tables import show

    config = load_config(args.config, rest, config_of)
    runs = plan(config, args.steps, args.pairs)
    check_out(Path(args.out))
    trained = (len(runs) - 1) * args.seeds
    if args.dry_run:
        table = Table("short run", "steps", "documents")
        for run in runs:
            steps = args.steps if run.sources else 0
            table.add_row(run.name, str(steps), f"{steps * config.positions_per_step:,}")
        show(table)
        evaluations = len(runs) * args.seeds
        print(f"{trained} short runs of {args.steps} steps, {evaluations} evaluations; nothing was trained")
        return 0
    try:
        result = learn_edges(config, args.steps, Path(args.out), args.pairs, args.seeds)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; what is done is kept, the same command goes on there") from None
    edges, intervals = result["edges"], result.get("intervals")
    title = f"edges: {result['rule']}"
    if intervals:
        title += f"; mean of {args.seeds} seeds with 95% intervals"
    table = Table("trained", *edges, title=title, title_justify="left")
    for source, row in edges.items():
        cells = [f"{edge:.3f}" for edge in row.values()]
        if intervals:
            spans = intervals[source].values()
            cells = [
                f"{cell} [{low:.3f}, {high:.3f}]" for cell, (low, high) in zip(cells, spans, strict=True)
            ]
        table.add_row(source, *cells)
    show(table)
    print(f"{trained} short runs; data.mixing.edges: {args.out}")
    return 0
