"""`rlpretrain ratios`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from rlpretrain.commands.arguments import count, path


def register(commands: Any) -> None:
    """Add `ratios` to the command line."""
    p = commands.add_parser(
        "ratios",
        help="a grid of replay ratios, and the largest share of new text that keeps the old loss",
        description="Trains and evaluates what is not done yet; ratios.json, .md and .svg. `trusted` and "
        "`reasons` in the JSON say whether the fit holds; the exit code is 0 either way.",
    )
    p.add_argument(
        "grid",
        type=path,
        help="YAML file: a run, two groups of its sources, ratios (examples/mixtures/dial_ratios.yaml)",
    )
    p.add_argument("--jobs", type=count, help="trainings at a time, in place of the file's")
    p.set_defaults(command=ratios)


def ratios(args: argparse.Namespace, rest: Sequence[str]) -> int:
    """`rlpretrain ratios GRID.yaml`."""
    from rlpretrain.experiments.ratio_tables import as_markdown
    from rlpretrain.experiments.ratios import run_ratios

    try:
        results = run_ratios(args.grid, jobs=args.jobs, say=lambda line: print(line, flush=True))
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; what is done is kept, the same command goes on there") from None
    print(as_markdown(results))
    print(f"numbers: {results['folder']}/ratios.json, .md" + (", .svg" if results["plotted"] else ""))
    return 0
