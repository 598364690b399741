"""`rlpretrain compare`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from rlpretrain.commands.arguments import count, path


def register(commands: Any) -> None:
    """Add `compare` to the command line."""
    p = commands.add_parser(
        "compare",
        help="objectives and seeds from one base: one table, one plot",
        description="Trains and evaluates what is not done yet; results.json, .csv and .svg.",
    )
    p.add_argument(
        "experiment",
        type=path,
        help="YAML file: methods, seeds, evaluation (examples/dial_family/compare.yaml)",
    )
    p.add_argument("--jobs", type=count, help="trainings at a time, in place of the file's")
    p.set_defaults(command=compare)


def compare(args: argparse.Namespace, rest: Sequence[str]) -> int:
    """`rlpretrain compare EXPERIMENT.yaml`."""
    from rlpretrain.experiments.compare import compare as run
    from rlpretrain.experiments.compare import differences, logged, part_tables, searches, table, tasks
    from rlpretrain.tracking.tables import show

    try:
        results = run(args.experiment, jobs=args.jobs, say=lambda line: print(line, flush=True))
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; what is done is kept, the same command goes on there") from None
    show(table(results))
    show(differences(results))
    if (searched := searches(results)) is not None:
        show(searched)
    if (logged_table := logged(results)) is not None:
        show(logged_table)
    if "tasks" in results:
        show(tasks(results))
    for part_table in part_tables(results["parts"], list(results["methods"])) if "parts" in results else ():
        show(part_table)
    print(f"numbers: {results['folder']}/results.json, .csv" + (", .svg" if results["plotted"] else ""))
    return 0
