"""RLP on a real checkpoint and real text, on a CPU: SmolLM2-135M and sentences of GSM8K's solutions.

    python -m examples.smollm2_rlp [--out runs/smollm2] [--seeds 0 1] [--data train.jsonl] [--quick]

`make real` installs what it needs and calls it. It makes the checkpoint (examples/smollm2_checkpoint.py) and
the documents (examples/gsm8k_calculations.py): sentences with a calculation of two or more operations, such
as "$20 + $2.5 + $7.5 =". A thought before the result can do one operation after the other.

The checkpoint has never seen such thoughts. So it is first trained on sentences of which a part has one, next
token by next token. From there the script compares (rlpretrain/experiments/compare.py) RLP with next-token
prediction on the same tokens and on the same compute, all evaluated on sentences of other problems with the
controls. RLP's settings are examples/smollm2_rlp.yaml. An interrupted call continues; the numbers go to
results.json.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from examples.gsm8k_calculations import LINES, read_calculations, write_rows
from examples.smollm2_checkpoint import QUICK_LAYERS, make_checkpoint
from rlpretrain import Pretrainer
from rlpretrain.config import ConfigError, ModelConfig
from rlpretrain.config.io import build, read_mapping, to_dict
from rlpretrain.data.stream import read_all
from rlpretrain.evaluation.evaluate import evaluate
from rlpretrain.evaluation.record import MEANING
from rlpretrain.experiments import compare
from rlpretrain.experiments.experiment import CommonEvaluation
from rlpretrain.models import load_with_tokenizer
from rlpretrain.objectives import delimiters, load_objective
from rlpretrain.tracking.progress import bar
from rlpretrain.training.records import write_json

HERE = Path(__file__).parent
RECIPE = HERE / "smollm2_rlp.yaml"
HELD_OUT = 250
"""Problems, the last of the file, whose sentences are not trained on."""
DOCUMENTS = 150
"""Held-out sentences that are evaluated."""
TRACES_STEPS, BATCH, SHARE = 250, 20, 0.65
"""Steps of the phase before RLP, sentences of a step, and the share of these that have a thought."""
LABELS = {
    "untouched": "untouched",
    "base": "before RLP",
    "rlp": "RLP",
    "ntp_tokens": "NTP, same tokens",
    "ntp_compute": "NTP, same compute",
}
NUMBERS = (
    "think_sampled",
    "think_greedy",
    "direct",
    "gain_frozen",
    "over_empty",
    "over_shuffled",
    "over_other",
    "direct_gain",
    "gain",
    "empty",
    "shuffled",
    "other",
    "no_think_loss",
    "unclosed",
    "length",
)
CONTROLS = ("empty", "shuffled", "other")
"""Thoughts that should not help; over_* is `gain_frozen` minus theirs, at the same positions."""
QUICK = {
    "max_steps": 2,
    "sampling": {"thoughts": 2, "max_thought_tokens": 4},
    "positions_per_step": 2,
    "optim": {"warmup_steps": 1},
    "log_every": 1,
    "checkpoint": {"every": 0},
}
"""Fields that --quick sets."""


def main(argv: Sequence[str] | None = None) -> int:
    """Checkpoint, documents, next-token phase, comparison, table."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--out", type=Path, default=Path("runs/smollm2"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="seeds of the trainings")
    parser.add_argument(
        "--data",
        type=Path,
        default=LINES,
        help="GSM8K's problems as JSON Lines (default: the lines of its solutions that are used)",
    )
    parser.add_argument("--steps", type=int, help="RLP steps; the recipe's by default")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="two layers, two steps: to see that it runs")
    parser.add_argument("--fresh", action="store_true", help="delete --out first")
    args = parser.parse_args(argv)
    begin = time.perf_counter()
    if args.fresh:
        shutil.rmtree(args.out, ignore_errors=True)
    try:
        make_checkpoint(args.out / "checkpoint", QUICK_LAYERS if args.quick else None)
        write_documents(args.data, args.out, 8 if args.quick else HELD_OUT)
        train_on_traces(args.out, args.quick)
        real = experiment(args)
        compare.run(real, HERE, say=lambda line: print(line, flush=True))
    except (ConfigError, ImportError) as error:
        print(f"smollm2_rlp: {error}", file=sys.stderr)
        return 2
    results = collect(real) | {"untouched": evaluate_untouched(args.out, real.evaluation)}
    results["seconds"] = time.perf_counter() - begin
    write_json(args.out / "results.json", results)
    show(results)
    print(f"numbers: {args.out / 'results.json'}; {results['seconds']:.0f} seconds in this call")
    return 0


def write_documents(data: Path, out: Path, held_out: int) -> None:
    """Write documents.jsonl, traces.jsonl with their thoughts, and held_out.jsonl of other problems."""
    if (out / "traces.jsonl").exists():
        return
    calculations = read_calculations(data)
    problems = sorted({calculation.problem for calculation in calculations})
    kept_back = set(problems[-held_out:])
    random.Random(1).shuffle(calculations)
    training = [calculation for calculation in calculations if calculation.problem not in kept_back]
    tests = [calculation for calculation in calculations if calculation.problem in kept_back]
    write_rows(out / "held_out.jsonl", [calculation.document for calculation in tests])
    write_rows(out / "documents.jsonl", [calculation.document for calculation in training])
    write_rows(out / "traces.jsonl", [calculation.trace for calculation in training])


def train_on_traces(out: Path, quick: bool) -> None:
    """Next-token prediction on sentences with and without a thought, under `out`/warm."""
    if (out / "warm" / "model" / "config.json").exists():
        return
    print("next-token phase on sentences with thoughts ...", flush=True)
    traces = {"path": str(out / "traces.jsonl"), "column": "question", "answer_column": "answer"}
    values = {
        "model": str(out / "checkpoint"),
        "data": {"path": str(out / "documents.jsonl"), "max_length": 128, "long": "truncate"},
        "ntp_data": traces | {"answer_join": "", "max_length": 128},
        "objective": {"name": "sft_mixed", "share": SHARE},
        "positions_per_step": 2 if quick else BATCH,
        "optim": {"lr": 2e-4, "schedule": "cosine", "warmup_steps": 1 if quick else 5},
        "max_steps": 2 if quick else TRACES_STEPS,
        "token_budget": 2048,
        "checkpoint": {"every": 0 if quick else 20, "keep": 1},
        "log_every": 10,
        "threads": 1,
        "output_dir": str(out / "warm"),
    }
    Pretrainer(build(values)).train(resume="auto")


def experiment(args: argparse.Namespace) -> compare.Experiment:
    """RLP, and next-token prediction on RLP's documents and on as many as its compute pays for."""
    out: Path = args.out
    changes: dict[str, Any] = dict(QUICK) if args.quick else {}
    if args.steps is not None:
        changes["max_steps"] = args.steps
    ntp = {"config": RECIPE.name, "like": "rlp"}
    documents = {"positions_per_step": 2 if args.quick else 32}  # of a step
    objective = read_mapping(RECIPE)["objective"]
    values = {
        "methods": {
            "rlp": {"config": RECIPE.name, "set": changes},
            "ntp_tokens": {**ntp, "match": "tokens", "set": changes | {"objective": "ntp"}},
            "ntp_compute": {**ntp, "match": "flops", "set": changes | {"objective": "ntp"} | documents},
        },
        "common": {"model": str(out / "warm" / "model"), "data": {"path": str(out / "documents.jsonl")}},
        "evaluation": {
            "data": {"path": str(out / "held_out.jsonl"), "max_length": 128, "long": "truncate"},
            "objective": objective,
            "documents": 8 if args.quick else DOCUMENTS,
            "thoughts": 2 if args.quick else 4,
            "max_thought_tokens": 4 if args.quick else 18,
            "greedy": True,
            "own": False,
        },
        "seeds": args.seeds,
        "jobs": args.jobs,
        "output_dir": str(out),
    }
    return compare.build_experiment(values, HERE)


def evaluate_untouched(out: Path, evaluation: CommonEvaluation) -> dict[str, Any]:
    """The numbers of the checkpoint before the next-token phase; frozen is the model after it."""
    file = out / "untouched.json"
    if not file.exists():
        values = {
            "model": str(out / "checkpoint"),
            "data": to_dict(evaluation.data),
            "objective": evaluation.objective,
            "sampling": {"max_thought_tokens": evaluation.max_thought_tokens},
            "output_dir": str(out),
        }
        config = build(values)
        tags = delimiters(config.objective)
        model, tokenizer, _ = load_with_tokenizer(config.model, tags)
        frozen = load_with_tokenizer(ModelConfig(path=str(out / "warm" / "model")), tags)[0]
        documents = read_all(config.data, tokenizer, limit=evaluation.documents, seed=evaluation.sample_seed)
        objective = load_objective(config, tokenizer)
        with bar("evaluating the untouched checkpoint") as progress:
            measured = evaluate(
                model,
                objective,
                documents,
                frozen=frozen,
                thoughts=evaluation.thoughts,
                greedy=True,
                progress=progress,
            )
        write_json(file, measured.columns())
    columns = json.loads(file.read_text())
    return numbers(compare.Measurements([columns], columns["rows"]))


def collect(real: compare.Experiment) -> dict[str, Any]:
    """The numbers of every model but the untouched one."""
    models = {name: numbers(measured) for name, measured in compare.read_measurements(real).items()}
    return {"seeds": list(real.seeds)} | models


def numbers(measured: compare.Measurements) -> dict[str, Any]:
    """The mean of each number, its interval as `_ci`, and each seed's mean as `_seeds`."""
    measured = replace(measured, by_seed=[seed | over_controls(seed) for seed in measured.by_seed])
    row: dict[str, Any] = {}
    for number in NUMBERS:
        mean, low, high = measured.interval(number)
        row |= {number: mean, f"{number}_ci": [low, high], f"{number}_seeds": measured.means(number)}
    return row


def over_controls(seed: Mapping[str, Sequence[float | None]]) -> dict[str, list[float | None]]:
    """`gain_frozen` minus that of each control, position by position."""

    def difference(gain: float | None, other: float | None) -> float | None:
        return None if gain is None or other is None else gain - other

    return {
        f"over_{control}": list(map(difference, seed["gain_frozen"], seed[control])) for control in CONTROLS
    }


def show(results: dict[str, Any]) -> None:
    """One table: a model in each column."""

    def cell(row: dict[str, Any], number: str) -> str:
        low, high = row[f"{number}_ci"]
        return f"{row[number]:.3f} [{low:.3f}, {high:.3f}]"

    meaning = MEANING | {f"over_{name}": f"gain_frozen minus {name}, paired" for name in CONTROLS}
    title = f"SmolLM2-135M (4-bit), held-out sentences, seeds {results['seeds']}; nats, 95% intervals"
    table = Table("", *LABELS.values(), "meaning", title=title)
    for number in NUMBERS:
        table.add_row(number, *(cell(results[name], number) for name in LABELS), meaning[number])
    Console(width=160).print(table)


if __name__ == "__main__":
    sys.exit(main())
