"""`rlpretrain eval`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlpretrain.commands import benchmarks, pass_at
from rlpretrain.commands.arguments import count, path, seed
from rlpretrain.commands.evaluation_settings import DEFAULTS, Subject, subject_of
from rlpretrain.config import ConfigError, ModelConfig

if TYPE_CHECKING:
    from rlpretrain.evaluation.record import Evaluation


def register(commands: Any) -> None:
    """Add `eval` to the command line."""
    p = commands.add_parser(
        "eval",
        help="measure the gain of thoughts on held-out text",
        description="Measure the gain of thoughts on held-out text, with controls and 95% intervals. The "
        "defaults below hold for a model; a run's own settings replace them.",
    )

    def add(name: str, text: str, **settings: Any) -> None:
        default = DEFAULTS.get(name.removeprefix("--").replace("-", "_"))
        p.add_argument(name, help=text if default is None else f"{text} (default: {default})", **settings)

    add("model", "hub id or folder of a model, or the folder of a run", type=path)
    add("--data", "held-out documents (default: the run's eval.data)", type=path)
    add(
        "--frozen",
        "initial model, against which gain_frozen is measured (default: that of the run in whose folder the "
        "model is, or the model itself)",
        type=path,
    )
    add(
        "--against",
        "second model at the same positions: the table gets its numbers and the differences",
        type=path,
    )
    add(
        "--objective",
        "where to think and how far to predict: a name, YAML, or a YAML file with the section or a whole "
        "configuration (default: the run's, or {name: rlp})",
    )
    add("--column", "column with the text")
    add("--by", "column to split the table by, for instance depth; numbers of many values by quartile")
    add("--documents", "random sample of so many documents (default: all)", type=count)
    add("--positions", "positions per document", type=count)
    add("--thoughts", "sampled thoughts per position", type=int)
    add("--temperature", "of the sampled thoughts", type=float)
    add("--max-thought-tokens", "longest thought", type=int)
    add("--max-length", "longest document in tokens", type=int)
    add("--dtype", "of the weights")
    add("--device", "cpu, cuda or auto (default: auto)", default="auto")
    add("--seed", "of positions, thoughts and the sample of documents", type=seed)
    add("--json", "write the numbers here too", type=path)
    p.add_argument("--trust-remote-code", action="store_true", help="run code of the model's repository")
    p.add_argument("--no-controls", action="store_true", help="leave out empty, shuffled and other thoughts")
    p.add_argument("--no-greedy", action="store_true", help="leave out the greedy thought")
    benchmarks.add_arguments(p)
    pass_at.add_arguments(p)
    p.set_defaults(command=evaluate)


def evaluate(args: argparse.Namespace, rest: Sequence[str]) -> int:
    """`rlpretrain eval MODEL_OR_RUN`: gain with intervals, controls, no-think loss, hits.

    Ctrl-C prints the numbers of the positions that are done, and exits with 130.
    """
    from rlpretrain.commands.evaluation_tables import difference_of, difference_table, numbers_table, split
    from rlpretrain.evaluation.evaluate import Interrupted
    from rlpretrain.files import check_file
    from rlpretrain.tracking.tables import show
    from rlpretrain.training.records import write_json

    if args.json and not Path(args.json).parent.is_dir():
        raise ConfigError(f"--json {args.json}: there is no such folder")
    if args.json:
        check_file(args.json, "--json")
    subject = subject_of(args)
    interrupted = False
    results: dict[str, Any] = (
        benchmarks.evaluate_tasks(args, subject.config, subject.frozen) if args.tasks else {}
    )
    results |= pass_at.evaluate_pass_at(args, subject.config, subject.frozen) if args.pass_at else {}
    if not subject.has_documents:
        if args.json:
            write_json(Path(args.json), results)
        return 0
    try:
        whole = _evaluate_model(args, subject, subject.config.model)
    except Interrupted as stop:
        whole, interrupted = stop.done, True
        print(f"interrupted: {len(whole.documents)} positions are done", file=sys.stderr)
    parts = {"all": whole} | (split(whole, args.by) if args.by else {})
    numbers = {name: part.summary() for name, part in parts.items()}
    show(numbers_table(parts, numbers))
    results = numbers | results
    if args.against and not interrupted:
        second = _evaluate_model(args, subject, _other_model(subject, args.against))
        results["against"] = second.summary()
        results["difference"] = difference_of(whole, second)
        show(difference_table(args.against, results))
    if args.json:
        write_json(Path(args.json), results)
    return 130 if interrupted else 0


def _evaluate_model(args: argparse.Namespace, subject: Subject, start: ModelConfig) -> Evaluation:
    """Evaluate one model at the subject's positions, with a progress bar."""
    from rlpretrain import models
    from rlpretrain.data.stream import read_all
    from rlpretrain.evaluation.evaluate import evaluate as run
    from rlpretrain.objectives import delimiters, load_objective
    from rlpretrain.ranks import join
    from rlpretrain.scoring import check_model
    from rlpretrain.tracking.progress import bar

    config = subject.config
    tags = delimiters(config.objective)
    device = join(config.device).device
    model, tokenizer, added = models.load_with_tokenizer(start, tags, config.seed)
    check_model(model.to(device))
    if added:
        print(f"added to the tokenizer, with untrained embeddings: {', '.join(added)}")
    frozen = None
    if subject.frozen is not None:
        frozen = models.load_with_tokenizer(subject.frozen, tags, config.seed)[0].to(device)
    documents = read_all(config.data, tokenizer, limit=args.documents, seed=config.seed)
    with bar("evaluating positions") as progress:
        return run(
            model,
            load_objective(config, tokenizer),
            documents,
            frozen=frozen,
            thoughts=config.eval.thoughts,
            positions=config.eval.positions,
            seed=config.seed,
            token_budget=config.token_budget,
            controls=not args.no_controls,
            greedy=not args.no_greedy,
            pad_id=tokenizer.pad_token_id or 0,
            progress=progress,
        )


def _other_model(subject: Subject, against: str) -> ModelConfig:
    """The model of `--against`, which may be a run too, with the settings of the subject's."""
    from dataclasses import replace

    from rlpretrain.commands.evaluation_settings import model_of_run, run_config

    path = str(model_of_run(Path(against))) if run_config(against) else against
    return replace(subject.config.model, path=path)
