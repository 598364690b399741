"""RLP on a real checkpoint and real text, on a CPU: SmolLM2-135M and short GSM8K problems.

    python -m examples.smollm2_rlp [--out runs/smollm2] [--seeds 0 1] [--data problems.jsonl] [--quick]

`make real` installs what it needs and calls it. It makes the checkpoint (examples/smollm2_checkpoint.py) and
the documents, problems with their solutions. Then it trains the checkpoint briefly on documents in which a
result may follow an annotation `<<48/2=24>>`, an empty one, or none, so that RLP's steps are not spent on the
tags. This phase ends with plain documents: a model that expects an annotation predicts a result badly without
one, and RLP's gain would be measured against that. From there it compares
(rlpretrain/experiments/compare.py) RLP with next-token prediction on the same tokens and on the same compute,
all evaluated on held-out problems with the controls. RLP's settings are examples/smollm2_rlp.yaml. An
interrupted call continues; the numbers go to results.json. It was not run to its end yet; by the time of
single steps it takes hours.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from examples.smollm2_checkpoint import QUICK_LAYERS, make_checkpoint
from rlpretrain import Pretrainer
from rlpretrain.config import ConfigError, DataConfig, ModelConfig
from rlpretrain.config.io import build, read_mapping, to_dict
from rlpretrain.data.opening import open_rows, quiet
from rlpretrain.data.stream import read_all
from rlpretrain.evaluation.evaluate import evaluate
from rlpretrain.evaluation.record import MEANING
from rlpretrain.experiments import compare
from rlpretrain.experiments.experiment import CommonEvaluation
from rlpretrain.models import load_with_tokenizer
from rlpretrain.objectives import delimiters, load_objective
from rlpretrain.training.records import write_json

HERE = Path(__file__).parent
RECIPE = HERE / "smollm2_rlp.yaml"
PROBLEMS = HERE / "gsm8k_short" / "problems.jsonl"
HELD_OUT = 200
RESULT = re.compile(r"=(\s*\$?)<<(.*?)>>")
"""An equals sign, what stands before the result, and the annotation."""
ANNOTATION = re.compile(r"(?<!=)<<.*?>>")
KINDS = {"annotated": r"=<<\2>>\1", "empty": r"=<<>>\1", "plain": r"=\1"}
"""What replaces RESULT."""
SHARES = (0.5, 0.2, 0.3)
"""Of these kinds among the documents of the next-token phase before RLP, up to its last steps."""
WARM_STEPS, PLAIN_STEPS, BATCH = 50, 15, 8
"""Steps of that phase, those at its end that have plain documents only, and documents of a step."""
LABELS = {
    "untouched": "untouched",
    "base": "before RLP",
    "rlp": "RLP",
    "ntp_tokens": "NTP, same tokens",
    "ntp_compute": "NTP, same compute",
}
NUMBERS = (
    "gain_frozen",
    "direct_gain",
    "gain",
    "empty",
    "shuffled",
    "other",
    "no_think_loss",
    "unclosed",
    "length",
)
QUICK = {
    "max_steps": 2,
    "sampling": {"thoughts": 2, "max_thought_tokens": 4},
    "positions_per_step": 2,
    "optim": {"warmup_steps": 1},
    "log_every": 1,
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
        default=str(PROBLEMS),
        help="problems: a file or hub id with the columns question and answer (default: 1,427 of GSM8K)",
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
        warm_up(args.out, args.quick)
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


def document(question: str, answer: str, kind: str = "plain") -> str:
    """Problem and solution as text, with the annotations of results as `kind` says.

    >>> document("Two and two?", "2+2 = <<2+2=4>>4\\n#### 4", "annotated")
    'Two and two?\\n2+2 =<<2+2=4>> 4\\nThe answer is 4'
    """
    text = f"{question.strip()}\n{answer.strip().replace('####', 'The answer is')}"
    return ANNOTATION.sub("", RESULT.sub(KINDS[kind], text))


def write_documents(data: str, out: Path, held_out: int) -> None:
    """Write held_out.jsonl, documents.jsonl without annotations, and warm.jsonl with some of them."""
    if (out / "warm.jsonl").exists():
        return
    name = None if Path(data).exists() else "main"
    source = DataConfig(path=data, name=name, column="question", meta_columns=("answer",))
    with quiet():
        problems = [(row["question"], row["answer"]) for row in open_rows(source)]
    random.Random(0).shuffle(problems)
    mixed = (WARM_STEPS - PLAIN_STEPS) * BATCH
    kinds = random.Random(1).choices(list(KINDS), SHARES, k=mixed) + ["plain"] * len(problems)
    training = list(zip(problems[held_out:], kinds, strict=False))
    write_texts(out / "held_out.jsonl", [document(*problem) for problem in problems[:held_out]])
    write_texts(out / "documents.jsonl", [document(*problem) for problem, _ in training])
    write_texts(out / "warm.jsonl", [document(*problem, kind) for problem, kind in training])


def write_texts(path: Path, texts: Sequence[str]) -> None:
    """A jsonl file, written under a temporary name first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    work = path.with_name(f".{path.name}.tmp")
    work.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    work.replace(path)


def warm_up(out: Path, quick: bool) -> None:
    """Next-token prediction on documents with and without annotations, under `out`/warm."""
    if (out / "warm" / "model" / "config.json").exists():
        return
    print("next-token phase on documents with annotations ...", flush=True)
    values = {
        "model": str(out / "checkpoint"),
        "data": {"path": str(out / "warm.jsonl"), "max_length": 200, "long": "truncate", "shuffle": False},
        "objective": "ntp",
        "positions_per_step": BATCH,
        "optim": {"lr": 3e-5, "warmup_steps": 1 if quick else 5},
        "max_steps": 2 if quick else WARM_STEPS,
        "token_budget": 2048,
        "eval": {"data": str(out / "held_out.jsonl"), "documents": 8 if quick else 40, "every": 0},
        "checkpoint": {"every": 20, "keep": 1},
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
    objective = read_mapping(RECIPE)["objective"]
    values = {
        "methods": {
            "rlp": {"config": RECIPE.name, "set": changes},
            "ntp_tokens": {**ntp, "match": "tokens", "set": changes | {"objective": "ntp"}},
            "ntp_compute": {**ntp, "match": "flops", "set": changes | {"objective": "ntp"}},
        },
        "common": {"model": str(out / "warm" / "model"), "data": {"path": str(out / "documents.jsonl")}},
        "evaluation": {
            "data": {"path": str(out / "held_out.jsonl"), "max_length": 160, "long": "truncate"},
            "objective": objective,
            "documents": 8 if args.quick else HELD_OUT,
            "thoughts": 2 if args.quick else 4,
            "max_thought_tokens": 4 if args.quick else 10,
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
        print("evaluating the untouched checkpoint ...", flush=True)
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
        measured = evaluate(
            model, objective, documents, frozen=frozen, thoughts=evaluation.thoughts, greedy=False
        )
        write_json(file, measured.summary())
    return json.loads(file.read_text())


def collect(real: compare.Experiment) -> dict[str, Any]:
    """The mean of each number, its interval as `_ci`, and each seed's mean as `_seeds`."""
    results: dict[str, Any] = {"seeds": list(real.seeds)}
    for name, measured in compare.read_measurements(real).items():
        row: dict[str, Any] = {}
        for number in NUMBERS:
            mean, low, high = measured.interval(number)
            row |= {number: mean, f"{number}_ci": [low, high], f"{number}_seeds": measured.means(number)}
        results[name] = row
    return results


def show(results: dict[str, Any]) -> None:
    """One table: a model in each column."""

    def cell(row: dict[str, Any], number: str) -> str:
        low, high = row[f"{number}_ci"]
        return f"{row[number]:.3f} [{low:.3f}, {high:.3f}]"

    title = f"SmolLM2-135M (4-bit), held-out GSM8K problems, seeds {results['seeds']}; nats, 95% intervals"
    table = Table("", *LABELS.values(), "meaning", title=title)
    for number in NUMBERS:
        table.add_row(number, *(cell(results[name], number) for name in LABELS), MEANING[number])
    Console(width=160).print(table)


if __name__ == "__main__":
    sys.exit(main())
