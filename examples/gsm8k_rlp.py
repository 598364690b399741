"""RLP on the GSM8K training problems, on a CPU, in minutes: any checkpoint, or a small one made here.

    python -m examples.gsm8k_rlp [--data train.jsonl] [--model HUB_ID_OR_FOLDER] [--steps N]
        [--section.field value ...]

A document is a problem and its worked solution. Without --model, a tokenizer and a small base model are
trained on the documents first (examples/gsm8k_base.py). The RLP part is examples/gsm8k_rlp.yaml; every
field of it can be set after the options above. The held-out problems are evaluated before and after, and
the gain is printed whatever it is. Under --out: documents.jsonl, held_out.jsonl, base/, rlp/ (the run and
its model) and results.json.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from examples.gsm8k_base import make_base, write_documents
from rlpretrain import Pretrainer, models
from rlpretrain.config import ConfigError, PretrainConfig
from rlpretrain.config.io import apply_overrides, build, read_mapping
from rlpretrain.data.stream import read_all
from rlpretrain.evaluation.evaluate import MEANING, Evaluation, evaluate
from rlpretrain.evaluation.intervals import interval
from rlpretrain.objectives import delimiters, load_objective
from rlpretrain.ranks import join
from rlpretrain.training.records import write_json

RECIPE = Path(__file__).with_name("gsm8k_rlp.yaml")
QUICK = {
    "max_steps": 4,
    "sampling.thoughts": 4,
    "positions_per_step": 4,
    "eval.documents": 24,
    "eval.thoughts": 2,
    "optim.warmup_steps": 2,
}
"""The fields that --quick sets."""
DERIVED = {
    "thought_worth": "gain_frozen of a sampled thought minus that of an empty one: what its words gain"
}
"""Numbers beside those of `rlpretrain eval`."""
SHOWN = (
    "gain_frozen",
    "direct_gain",
    "gain",
    "thought_worth",
    "empty",
    "shuffled",
    "other",
    "no_think_loss",
    "unclosed",
    "length",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Documents, base model, training, evaluation; exit code 2 and a message for a ConfigError."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.add_argument(
        "--data",
        default="openai/gsm8k",
        help="hub id, or a local jsonl with the columns question and answer, for instance train.jsonl of "
        "the repository openai/grade-school-math (default: %(default)s)",
    )
    parser.add_argument(
        "--model", help="hub id or folder of a base checkpoint; missing thought tags are added to it"
    )
    parser.add_argument("--steps", type=int, help="RLP steps; the recipe's by default")
    parser.add_argument(
        "--base-steps", type=int, default=240, help="steps of the small base model (default: %(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/gsm8k"), help="folder of all files (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--quick", action="store_true", help="a minute: a tiny base and a few steps, to see that it runs"
    )
    parser.add_argument("--fresh", action="store_true", help="delete --out first, the base model too")
    args, overrides = parser.parse_known_args(argv)
    try:
        return run(args, overrides)
    except (ConfigError, ImportError) as error:
        print(f"gsm8k_rlp: {error}", file=sys.stderr)
        return 2


def run(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    """The whole experiment, in order."""
    out: Path = args.out
    if args.fresh:
        shutil.rmtree(out, ignore_errors=True)
    if (out / "rlp" / "run.json").exists():
        raise ConfigError(f"{out} contains a run: --fresh deletes it, --out takes another folder")
    config = recipe(args, overrides)
    seconds: dict[str, float] = {}
    with timed("documents", seconds):
        counts = write_documents(args.data, out)
    if not args.model:
        with timed("base", seconds):
            make_base(out, config, 30 if args.quick else args.base_steps, args.seed, args.quick)
    with timed("evaluation before", seconds):
        before = evaluation(config, None, out)
    with timed("rlp", seconds):
        ended = Pretrainer(config).train()
    with timed("evaluation after", seconds):
        after = evaluation(config, ended["model"], out)
    results = {
        "data": args.data,
        "model": args.model,
        "seed": args.seed,
        "documents": counts,
        "steps": ended["steps"],
        "stopped": ended["stopped"],
        "objective": config.objective,
        "before": numbers(before),
        "after": numbers(after),
        "change": change(before, after),
        "seconds": seconds,
    }
    write_json(out / "results.json", results)
    show(results)
    print(f"numbers: {out / 'results.json'}; {sum(seconds.values()):.0f} seconds in all")
    return 0


@contextmanager
def timed(name: str, seconds: dict[str, float]) -> Iterator[None]:
    """Announce a part, and store the seconds that it took."""
    print(f"{name} ...", flush=True)
    begin = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - begin


def recipe(args: argparse.Namespace, overrides: Sequence[str]) -> PretrainConfig:
    """The YAML file with this run's model, data and folder, then the options, then the overrides."""
    values = read_mapping(RECIPE)
    values |= {
        "model": args.model or str(args.out / "base" / "model"),
        "output_dir": str(args.out / "rlp"),
        "seed": args.seed,
    }
    values["data"]["path"] = str(args.out / "documents.jsonl")
    chosen: dict[str, Any] = dict(QUICK) if args.quick else {}
    if args.steps is not None:
        chosen["max_steps"] = args.steps
    values = apply_overrides(values, [f"--{name}={value}" for name, value in chosen.items()])
    return build(apply_overrides(values, overrides))


def evaluation(config: PretrainConfig, trained: str | None, out: Path) -> Evaluation:
    """The held-out problems under the trained or the initial model; gains are against the initial one."""
    device, tags = join(config.device).device, delimiters(config.objective)
    initial, tokenizer, _ = models.load_with_tokenizer(config.model, tags, config.seed)
    initial = initial.to(device)
    model = initial
    if trained:
        trained_config = replace(config.model, path=trained, tokenizer=None, revision=None)
        model = models.load_with_tokenizer(trained_config, tags, config.seed)[0].to(device)
    data = replace(config.data, path=str(out / "held_out.jsonl"))
    return evaluate(
        model,
        load_objective(config, tokenizer),
        read_all(data, tokenizer, limit=config.eval.documents),
        frozen=initial if trained else None,
        thoughts=config.eval.thoughts,
        seed=config.seed,
        token_budget=config.token_budget,
        pad_id=tokenizer.pad_token_id or 0,
    )


def position_values(evaluated: Evaluation) -> dict[str, np.ndarray]:
    """The numbers of every position, with those of DERIVED."""
    values = evaluated.values
    direct = values["gain_frozen"] - values["gain"]  # 0 before training
    return values | {"direct_gain": direct, "thought_worth": values["gain_frozen"] - values["empty"]}


def numbers(evaluated: Evaluation) -> dict[str, Any]:
    """Means, each with its 95% interval under the same name with `_ci`."""
    derived = {name: position_values(evaluated)[name] for name in ("direct_gain", *DERIVED)}
    return evaluated.summary() | means(derived, evaluated.rows)


def change(before: Evaluation, after: Evaluation) -> dict[str, Any]:
    """After minus before at the same positions, with intervals."""
    first, second = position_values(before), position_values(after)
    names = ("gain_frozen", "gain", "thought_worth")
    return means({name: second[name] - first[name] for name in names}, after.rows)


def means(values: Mapping[str, np.ndarray], rows: Sequence[str]) -> dict[str, Any]:
    """Means over positions, each with its 95% interval under the same name with `_ci`."""
    with_intervals: dict[str, Any] = {}
    for name, of_positions in values.items():
        with_intervals[name], with_intervals[f"{name}_ci"] = interval(of_positions, rows=rows)
    return with_intervals


def show(results: dict[str, Any]) -> None:
    """One table, and its conclusion in two sentences."""

    def cell(row: dict[str, Any], name: str) -> str:
        low, high = row[f"{name}_ci"]
        return f"{row[name]:.3f} [{low:.3f}, {high:.3f}]"

    before, after, meaning = results["before"], results["after"], MEANING | DERIVED
    title = f"GSM8K, held-out problems, before and after {results['steps']} RLP steps; nats, 95% intervals"
    table = Table("", "before", "after", "meaning", title=title)
    for name in SHOWN:
        table.add_row(name, cell(before, name), cell(after, name), meaning[name])
    console = Console(width=130)
    console.print(table)
    subjects = {
        "gain_frozen": "Thinking, against the initial model without a thought",
        "thought_worth": "The words of a thought, against an empty one",
    }
    for name, subject in subjects.items():
        low, high = after[f"{name}_ci"]
        verdict = "helps" if low > 0 else "hurts" if high < 0 else "makes no measurable difference"
        console.print(f"{subject}: {verdict}, {cell(after, name)} nats.")


if __name__ == "__main__":
    sys.exit(main())
