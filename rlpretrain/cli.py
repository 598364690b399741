"""`rlpretrain`: train, rollout, serve, eval, compare, report, inspect, prepare, corpus, doctor, metrics."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlpretrain.config import ConfigError, ModelConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; a ConfigError ends with its message and exit code 2, a run that diverged with 1, without traceback."""
    sys.path.append(os.getcwd())  # objectives, position functions and judges of the user's own, as TRL's command line has it
    parser = make_parser()
    args, rest = parser.parse_known_args(argv)
    if rest and args.command not in (train, rollout):
        parser.error(f"unknown arguments: {' '.join(rest)}")
    try:
        return args.command(args, rest) or 0
    except (ConfigError, ImportError) as error:
        print(f"rlpretrain: {error}", file=sys.stderr)
        return 2


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="rlpretrain", description="Reinforcement learning as a pretraining objective.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    p = commands.add_parser("train", help="train from a YAML configuration", allow_abbrev=False,
                            description="Every field can be set: --section.field value; --fields lists them all.")  # fmt: skip
    p.add_argument("config", nargs="?", help="YAML file")
    p.add_argument("--resume", nargs="?", const="auto", help="auto (the newest usable checkpoint), or a checkpoint folder")
    p.add_argument("--dry-run", action="store_true", help="check everything, print memory and schedule, load no weights")
    p.add_argument("--fields", action="store_true", help="list every field with default and meaning, also of CONFIG's objective")
    p.set_defaults(command=train)

    p = commands.add_parser("rollout", help="only sample: keep the groups of every step, for train --replay", allow_abbrev=False)
    p.add_argument("config", help="YAML file; --section.field value as in train")
    p.set_defaults(command=rollout)

    p = commands.add_parser("serve", help="an engine behind HTTP, for trainers elsewhere")
    p.add_argument("model", help="hub id or folder")
    p.add_argument("--engine", choices=["vllm", "hf"], default="vllm")
    p.add_argument("--host", default="127.0.0.1", help="address to listen on; any but loopback needs --token-file")
    p.add_argument("--port", type=int, default=8000)
    p.add_argument("--token-file", help="file with the bearer token that every request must carry")
    p.add_argument("--weights-dir", help="the only folder that weights are loaded from; none, no new weights")
    p.add_argument("--name", help="what /v1/models calls the model; its path by default")
    p.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    p.add_argument("--device", default="auto", help="of the hf engine")
    p.add_argument("--max-model-len", type=int, help="longest context plus thought in tokens; the model's by default")
    p.add_argument("--batch-size", type=int, default=256, help="most thoughts decoded at once")
    p.add_argument("--kv-cache-gib", type=float, default=0.5, help="vLLM's key-value cache; 0 leaves it to the memory share")
    p.add_argument("--gpu-memory-utilization", type=float, default=0.9, help="share of a GPU, with --kv-cache-gib 0")
    p.add_argument("--max-requests", type=int, default=256, help="sampling requests at a time; more get 429")
    p.add_argument("--max-n", type=int, default=1024, help="thoughts for one prompt")
    p.add_argument("--max-body-mib", type=float, default=8, help="largest request body")
    p.add_argument("--request-timeout", type=float, default=600, help="seconds that sampling may take")
    p.add_argument("--revision", help="branch, tag or commit on the hub")
    p.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the checkpoint")
    p.set_defaults(command=serve)

    p = commands.add_parser("eval", help="what thinking is worth on held-out text")
    p.add_argument("model", help="hub id or folder")
    p.add_argument("--data", required=True, help="held-out documents")
    p.add_argument("--frozen", help="initial model for the honest gain; the model itself by default")
    p.add_argument("--objective", default="{name: rlp}", help="YAML: the objective section (where to think, how far to predict)")
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
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--json", help="write the numbers here too")
    p.set_defaults(command=evaluate)

    p = commands.add_parser("compare", help="objectives and seeds from one base: one table, one plot",
                            description="Trains and evaluates what is not done yet; results.json, .csv and .svg.")  # fmt: skip
    p.add_argument("experiment", help="YAML file: methods, seeds, evaluation (examples/dial_family/compare.yaml)")
    p.add_argument("--jobs", type=int, help="trainings at a time, in place of the file's")
    p.set_defaults(command=compare)

    p = commands.add_parser("report", help="a run as one HTML page: curves, warnings, thoughts and what each is worth")
    p.add_argument("run", help="folder of a run")
    p.add_argument("--out", help="file to write; report.html in the run's folder by default")
    p.add_argument("--step", type=int, help="step whose thoughts are shown, where the run kept them; the last by default")
    p.add_argument("--documents", type=int, default=12, help="how many documents")
    p.add_argument("--model", help="model that gains are computed with; the trained one by default")
    p.set_defaults(command=report)

    p = commands.add_parser("inspect", help="where would thinking help this model? The same page for any checkpoint and text")
    p.add_argument("model", help="hub id or folder")
    p.add_argument("--text", required=True, help="file with documents")
    p.add_argument("--out", default="inspect.html", help="file to write")
    p.add_argument("--objective", default="{}", help="YAML: fields of the objective section (positions, target_length, ...)")
    p.add_argument("--documents", type=int, default=12, help="how many documents")
    p.add_argument("--thoughts", type=int, default=4, help="sampled thoughts per position")
    p.add_argument("--max-thought-tokens", type=int, default=128)
    p.add_argument("--max-length", type=int, default=512, help="longest document in tokens")
    p.add_argument("--seed", type=int, default=0)
    p.set_defaults(command=inspect)

    p = commands.add_parser("prepare", help="what `trl grpo` takes from disk: a checkpoint that knows thoughts, and prompts",
                            description="Writes OUT/model and OUT/prompts; docs/trl.md has the rest.")  # fmt: skip
    p.add_argument("model", help="hub id or folder")
    p.add_argument("--out", required=True, help="folder to write")
    p.add_argument("--data", required=True, help="documents to train on")
    p.add_argument("--held-out", help="documents to evaluate on: the split test")
    p.add_argument("--objective", default="{name: rlp}", help="YAML: the objective section (where to think, how far to predict)")
    p.add_argument("--column", default="text", help="column with the text")
    p.add_argument("--max-length", type=int, default=2048, help="longest document in tokens")
    p.add_argument("--epochs", type=int, default=1, help="how often each document is given new positions")
    p.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="of the written weights")
    p.add_argument("--revision", help="branch, tag or commit on the hub")
    p.add_argument("--trust-remote-code", action="store_true")
    p.add_argument("--seed", type=int, default=0)
    p.set_defaults(command=prepare)

    p = commands.add_parser("corpus", help="make a controlled corpus")
    p.add_argument("kind", choices=["dial", "dial_family"], help="dial_family: in the formats of all objectives")
    p.add_argument("--out", required=True, help="folder to write")
    p.add_argument("--mix", help="composition of the base documents (b9, d1, s20, c4, c6, c7, c8; family: f1)")
    p.add_argument("--base", type=int, default=200_000, help="base documents")
    p.add_argument("--train", type=int, default=50_000, help="plain documents for reinforcement pretraining")
    p.add_argument("--held-out", type=int, default=1_200)
    p.add_argument("--depths", default="1-4", help="depths of the training problems, as 1-4 or 1,2,5")
    p.add_argument("--held-out-depths", default="1-6")
    p.add_argument("--seed", type=int, default=0)
    p.set_defaults(command=corpus)

    p = commands.add_parser("doctor", help="check this installation")
    p.set_defaults(command=lambda args, rest: _doctor())
    p = commands.add_parser("metrics", help="every logged number, its meaning and healthy range")
    p.set_defaults(command=lambda args, rest: _metrics())
    return parser


def train(args: argparse.Namespace, rest: Sequence[str]) -> int:
    """`rlpretrain train CONFIG.yaml [--field value ...] [--resume auto] [--dry-run]`."""
    from rlpretrain.config import io as c

    if args.fields:
        _print_fields(c, c.load(args.config, rest).objective.get("name", "rlp") if args.config else None)
        return 0
    if not args.config:
        raise ConfigError("which configuration? rlpretrain train CONFIG.yaml (or --fields for all there is to set)")
    config = c.load(args.config, rest)
    if args.dry_run:
        from rlpretrain.dry_run import dry_run

        return dry_run(config, Path(args.config).parent)
    from rlpretrain.pretrainer import Pretrainer
    from rlpretrain.run import Diverged

    try:
        result = Pretrainer(config).train(resume=args.resume)
    except Diverged as error:
        print(f"rlpretrain: {error}", file=sys.stderr)
        return 1
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in result.items()}))
    return 0


def rollout(args: argparse.Namespace, rest: Sequence[str]) -> int:
    """`rlpretrain rollout CONFIG.yaml [--field value ...]`."""
    from rlpretrain.config import io as c
    from rlpretrain.pretrainer import Pretrainer

    print(json.dumps(Pretrainer(c.load(args.config, rest)).rollout()))
    return 0


def serve(args: argparse.Namespace, rest: Sequence[str]) -> int:
    """`rlpretrain serve MODEL --engine vllm|hf`."""
    from rlpretrain.serve import serve as run

    return run(args)


def evaluate(args: argparse.Namespace, rest: Sequence[str]) -> int:
    """`rlpretrain eval MODEL --data FILE`: gain with intervals, controls, no-think loss, hits with and without thinking."""
    from rich.console import Console
    from rich.table import Table

    from rlpretrain import models
    from rlpretrain.config import io as c
    from rlpretrain.documents import read_all
    from rlpretrain.evaluate import MEANING, by_meta
    from rlpretrain.evaluate import evaluate as run
    from rlpretrain.objectives import delimiters
    from rlpretrain.objectives import load as load_objective
    from rlpretrain.ranks import join
    from rlpretrain.records import write_json

    model_config = {"path": args.model, "dtype": args.dtype, "trust_remote_code": args.trust_remote_code}
    objective = _section(args.objective)
    values = {
        "model": model_config, "objective": objective, "output_dir": os.devnull,
        "data": {"path": args.data, "column": args.column, "max_length": args.max_length,
                 "meta_columns": [args.by] if args.by else []},
        "sampling": {"temperature": args.temperature, "max_thought_tokens": args.max_thought_tokens},
        "eval": {"thoughts": args.thoughts} | ({"documents": args.documents} if args.documents is not None else {}),
    }  # fmt: skip
    config = c.build(values)
    tags = delimiters(config.objective)
    device = join(args.device).device
    model, tokenizer, added = models.load(config.model, tags, args.seed)
    models.check_head(model.to(device))
    if added:
        print(f"added to the tokenizer, with untrained embeddings: {', '.join(added)}")
    frozen = None
    if args.frozen:
        frozen = models.load(ModelConfig(**(model_config | {"path": args.frozen})), tags, args.seed)[0].to(device)
    if args.json and not Path(args.json).parent.is_dir():
        raise ConfigError(f"--json {args.json}: there is no such folder")
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
    parts = {"all": whole} | (by_meta(whole, args.by) if args.by else {})
    results = {name: part.summary() for name, part in parts.items()}
    table = Table("", *(f"{n} ({len(p.documents)})" for n, p in parts.items()), "meaning")
    for name in MEANING:
        if name in results["all"]:
            cells = [f"{r[name]:.3f} [{r[f'{name}_ci'][0]:.3f}, {r[f'{name}_ci'][1]:.3f}]" for r in results.values()]
            table.add_row(name, *cells, MEANING[name])
    Console().print(table)
    if args.json:
        write_json(Path(args.json), results)
    return 0


def compare(args: argparse.Namespace, rest: Sequence[str]) -> int:
    """`rlpretrain compare EXPERIMENT.yaml`."""
    from rich.console import Console

    from rlpretrain.compare import compare as run
    from rlpretrain.compare import table

    console = Console(width=None if sys.stdout.isatty() else 200)
    results = run(args.experiment, jobs=args.jobs, say=console.print)
    console.print(table(results))
    console.print(f"numbers: {results['folder']}/results.json, .csv, .svg")
    return 0


def report(args: argparse.Namespace, rest: Sequence[str]) -> int:
    """`rlpretrain report RUN_DIR`."""
    from rlpretrain.report import report as run

    print(run(args.run, args.out, step=args.step, documents=args.documents, model=args.model))
    return 0


def inspect(args: argparse.Namespace, rest: Sequence[str]) -> int:
    """`rlpretrain inspect MODEL --text FILE`."""
    from rlpretrain.report import inspect as run

    print(run(args.model, args.text, args.out, objective=_section(args.objective), documents=args.documents,
              thoughts=args.thoughts, max_thought_tokens=args.max_thought_tokens, max_length=args.max_length,
              seed=args.seed))  # fmt: skip
    return 0


def prepare(args: argparse.Namespace, rest: Sequence[str]) -> int:
    """`rlpretrain prepare MODEL --out DIR --data FILE`."""
    from rlpretrain.config import ModelConfig
    from rlpretrain.trl_data import prepare as run

    model = ModelConfig(path=args.model, revision=args.revision, dtype=args.dtype, trust_remote_code=args.trust_remote_code)
    documents = {"train": args.data} | ({"test": args.held_out} if args.held_out else {})
    found = run(model, args.out, _section(args.objective), documents, column=args.column, max_length=args.max_length,
                epochs=args.epochs, seed=args.seed)  # fmt: skip
    added = found.pop("added")
    print(f"model    {Path(args.out) / 'model'}" + (f", new to it: {', '.join(added)}" if added else ""))
    print(f"prompts  {Path(args.out) / 'prompts'}, " + ", ".join(f"{split}: {n}" for split, n in found.items()))
    return 0


def corpus(args: argparse.Namespace, rest: Sequence[str]) -> int:
    """`rlpretrain corpus dial --out DIR`."""
    kind = importlib.import_module(f"rlpretrain.corpora.{args.kind}")
    mix = {"mix": args.mix} if args.mix else {}
    try:
        paths = kind.write(args.out, base=args.base, train=args.train, held_out=args.held_out, seed=args.seed, **mix,
                           depths=_depths(args.depths), held_out_depths=_depths(args.held_out_depths))  # fmt: skip
    except ValueError as error:
        raise ConfigError(str(error)) from None
    for name, path in paths.items():
        print(f"{name:9} {path}")
    return 0


def _section(text: str) -> Any:
    """The objective section of a command line."""
    import yaml

    try:
        found = yaml.safe_load(text)
        return {"name": found} if isinstance(found, str) else found
    except yaml.YAMLError as error:
        raise ConfigError(f"--objective {text} is not YAML: {str(error).splitlines()[0]}") from None


def _depths(text: str) -> list[int]:
    """`1-4` or `1,2,5` as numbers."""
    try:
        low, dash, high = text.partition("-")
        found = list(range(int(low), int(high) + 1)) if dash else [int(x) for x in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise ConfigError(f"depths are written 1-4 or 1,2,5, not '{text}'")
    return found


def _doctor() -> int:
    from rlpretrain import doctor

    return doctor.main()


def _metrics() -> int:
    from rich.console import Console

    from rlpretrain.metrics import table

    Console().print(table())
    return 0


def _print_fields(c: Any, used: str | None) -> None:
    from rich.console import Console
    from rich.table import Table

    from rlpretrain.objectives import available, find

    table = Table("field", "default", "meaning")
    for row in c.describe(c.PretrainConfig):
        table.add_row(*row)
    for name in dict.fromkeys([*available(), *filter(None, [used])]):
        for field, default, text in c.describe(find(name).Config):
            table.add_row(f"objective.{field} ({name})", default, text)
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
