"""`rlpretrain eval`."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlpretrain.commands import benchmarks, pass_at
from rlpretrain.commands.arguments import objective_section, path, seed
from rlpretrain.config import ConfigError, ModelConfig


def register(commands: Any) -> None:
    """Add `eval` to the command line."""
    p = commands.add_parser("eval", help="measure the gain of thoughts on held-out text")
    p.add_argument("model", type=path, help="hub id or folder")
    p.add_argument("--data", type=path, help="held-out documents")
    p.add_argument(
        "--frozen", type=path, help="initial model for the honest gain; the model itself by default"
    )
    p.add_argument(
        "--objective",
        default="{name: rlp}",
        help="YAML: the objective section (where to think, how far to predict)",
    )
    p.add_argument("--column", default="text", help="column with the text")
    p.add_argument("--by", help="column to split the table by, for instance depth")
    p.add_argument("--documents", type=int, help="how many documents; all by default")
    p.add_argument("--thoughts", type=int, default=4, help="sampled thoughts per position")
    p.add_argument("--temperature", type=float, default=1.0)
    p.add_argument("--max-thought-tokens", type=int, default=512)
    p.add_argument("--max-length", type=int, default=2048, help="longest document in tokens")
    p.add_argument("--dtype", default="float32")
    p.add_argument("--device", default="auto")
    p.add_argument("--trust-remote-code", action="store_true")
    p.add_argument("--seed", type=seed, default=0)
    p.add_argument("--json", type=path, help="write the numbers here too")
    benchmarks.add_arguments(p)
    pass_at.add_arguments(p)
    p.set_defaults(command=evaluate, usage_error=p.error)


def evaluate(args: argparse.Namespace, rest: Sequence[str]) -> int:
    """`rlpretrain eval MODEL --data FILE`: gain with intervals, controls, no-think loss, hits."""
    from rich.table import Table

    from rlpretrain import models
    from rlpretrain.config import io as c
    from rlpretrain.data.stream import read_all
    from rlpretrain.evaluation.evaluate import MEANING, by_meta
    from rlpretrain.evaluation.evaluate import evaluate as run
    from rlpretrain.files import check_file
    from rlpretrain.objectives import delimiters, load_objective
    from rlpretrain.ranks import join
    from rlpretrain.scoring import check_model
    from rlpretrain.tracking.tables import show
    from rlpretrain.training.records import write_json

    benchmarks.check_data(args)
    if args.json and not Path(args.json).parent.is_dir():
        raise ConfigError(f"--json {args.json}: there is no such folder")
    if args.json:
        check_file(args.json, "--json")
    model_config = {"path": args.model, "dtype": args.dtype, "trust_remote_code": args.trust_remote_code}
    objective = objective_section(args.objective)
    values = {
        "model": model_config,
        "objective": objective,
        "output_dir": os.devnull,
        "seed": args.seed,
        "data": {
            "path": args.data or os.devnull,
            "column": args.column,
            "answer_column": args.answer_column,
            "answer_join": args.answer_join,
            "max_length": args.max_length,
            "meta_columns": [args.by] if args.by else [],
        },
        "sampling": {"temperature": args.temperature, "max_thought_tokens": args.max_thought_tokens},
        "eval": {"thoughts": args.thoughts}
        | ({"documents": args.documents} if args.documents is not None else {}),
    }
    config = c.build(values)
    more = benchmarks.evaluate_tasks(args, config) if args.tasks else {}
    more |= pass_at.evaluate_pass_at(args, config) if args.pass_at else {}
    if not args.data:
        if args.json:
            write_json(Path(args.json), more)
        return 0
    tags = delimiters(config.objective)
    device = join(args.device).device
    model, tokenizer, added = models.load_with_tokenizer(config.model, tags, args.seed)
    check_model(model.to(device))
    if added:
        print(f"added to the tokenizer, with untrained embeddings: {', '.join(added)}")
    frozen = None
    if args.frozen:
        frozen = models.load_with_tokenizer(
            ModelConfig(**(model_config | {"path": args.frozen})), tags, args.seed
        )[0].to(device)
    documents = read_all(config.data, tokenizer, limit=args.documents)
    pad = tokenizer.pad_token_id or 0
    whole = run(
        model,
        load_objective(config, tokenizer),
        documents,
        frozen=frozen,
        thoughts=args.thoughts,
        seed=args.seed,
        pad_id=pad,
    )

    def cell(row: dict[str, Any], name: str) -> str:
        if name not in row:
            return ""
        low, high = row.get(f"{name}_ci", (math.nan, math.nan))  # NaN: all of it is one source row
        return f"{row[name]:.3f}" + ("" if math.isnan(low) else f" [{low:.3f}, {high:.3f}]")

    parts = {"all": whole} | (by_meta(whole, args.by) if args.by else {})
    results = {name: part.summary() for name, part in parts.items()} | more
    table = Table("", *(f"{n} ({len(p.documents)})" for n, p in parts.items()), "meaning")
    for name in MEANING:
        if name in results["all"]:
            cells = [cell(results[part], name) for part in parts]
            table.add_row(name, *cells, MEANING[name])
    show(table)
    if args.json:
        write_json(Path(args.json), results)
    return 0
