"""RLP on real text, on a CPU, in minutes: the GSM8K training problems, and any Hugging Face checkpoint or a
small one made here.

    python -m examples.gsm8k_rlp [--data train.jsonl] [--model HUB_ID_OR_FOLDER] [--steps N] [--section.field
    value ...]

A document is a problem and its worked solution. Without --model, a tokenizer and a small base model are
trained on the documents first, with the objective `ntp`. The RLP part is examples/gsm8k_rlp.yaml; every field
of it can be set behind the options above. The held-out problems are evaluated before and after, and the gain
is printed whatever it is. Under --out: documents.jsonl, held_out.jsonl, base/, rlp/ (the run and its model)
and results.json.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlpretrain.config import ConfigError
from rlpretrain.training.records import write_json

if TYPE_CHECKING:
    from rlpretrain.config import PretrainConfig
    from rlpretrain.evaluation.evaluate import Evaluation

RECIPE = Path(__file__).with_name("gsm8k_rlp.yaml")
ANNOTATION = re.compile(r"<<.*?>>")
HELD_OUT = 0.05
BASE = {
    "objective": "ntp",
    "positions_per_step": 16,
    "token_budget": 4096,
    "checkpoint": {"every": 0},
    "log_every": 100,
    "optim": {"lr": 3e-3, "schedule": "cosine", "warmup_steps": 30, "weight_decay": 0.01},
    "policy": {"backend": "torch"},
}
"""How the small base model is pretrained; its data section is the recipe's."""
SHAPE = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
VOCABULARY = 2048
QUICK = {
    "sampling.thoughts": 4,
    "positions_per_step": 4,
    "eval.documents": 24,
    "eval.thoughts": 2,
    "optim.warmup_steps": 2,
}
QUICK_SHAPE = SHAPE | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16}
MORE = {
    "direct_gain": (
        "what further training did without any thought: log p(target | context) now, minus the frozen model's"
    ),
    "thought_worth": (
        "gain_frozen of a sampled thought minus that of an empty one: what the words in it are worth"
    ),
}
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
    """Prepare, pretrain a base where none is given, train, evaluate; a ConfigError ends with its message
    and exit code 2.
    """
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.add_argument(
        "--data",
        default="openai/gsm8k",
        help="hub id, or a local jsonl with the columns question and answer, for instance train.jsonl of "
        "the repository openai/grade-school-math (default: %(default)s)",
    )
    parser.add_argument(
        "--model", help="hub id or folder of a base checkpoint; the tags of a thought are added where missing"
    )
    parser.add_argument("--steps", type=int, help="RLP steps; the recipe's by default")
    parser.add_argument(
        "--base-steps", type=int, default=240, help="steps of the small base model (default: %(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/gsm8k"), help="folder of everything (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a minute: a tiny base and a few steps, to see that all of it runs",
    )
    parser.add_argument(
        "--fresh", action="store_true", help="forget what --out holds, a base model made before too"
    )
    args, overrides = parser.parse_known_args(argv)
    try:
        return run(args, overrides)
    except (ConfigError, ImportError) as error:
        print(f"gsm8k_rlp: {error}", file=sys.stderr)
        return 2


def run(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    """The whole experiment, in order."""
    from rlpretrain import Pretrainer

    out: Path = args.out
    if args.fresh:
        shutil.rmtree(out, ignore_errors=True)
    if (out / "rlp" / "run.json").exists():
        raise ConfigError(
            f"{out} holds a finished or broken run: --fresh forgets it, --out takes another folder"
        )
    config = recipe(args, overrides)
    seconds: dict[str, float] = {}

    def timed(name: str, work: Any) -> Any:
        print(f"{name} ...", flush=True)
        begin = time.perf_counter()
        result = work()
        seconds[name] = time.perf_counter() - begin
        return result

    counts = timed("documents", lambda: prepare(args.data, out))
    if not args.model:
        timed(
            "base",
            lambda: make_base(out, config, 30 if args.quick else args.base_steps, args.seed, args.quick),
        )
    before = timed("evaluation before", lambda: evaluation(config, None, out))
    spent = timed("rlp", lambda: Pretrainer(config).train())
    after = timed("evaluation after", lambda: evaluation(config, spent["model"], out))
    results = {
        "data": args.data,
        "model": args.model,
        "seed": args.seed,
        "documents": counts,
        "steps": spent["steps"],
        "stopped": spent["stopped"],
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


def recipe(args: argparse.Namespace, overrides: Sequence[str]) -> PretrainConfig:
    """The YAML twin with this run's model, data and folder, the options, and the overrides on top."""
    import yaml

    from rlpretrain.config.io import apply_overrides, build

    values = yaml.safe_load(RECIPE.read_text())
    values |= {
        "model": args.model or str(args.out / "base" / "model"),
        "output_dir": str(args.out / "rlp"),
        "seed": args.seed,
    }
    values["data"]["path"] = str(args.out / "documents.jsonl")
    quick = {"max_steps": 4} | QUICK if args.quick else {}
    chosen = quick | ({"max_steps": args.steps} if args.steps is not None else {})
    values = apply_overrides(values, [f"--{name}={value}" for name, value in chosen.items()])
    return build(apply_overrides(values, overrides))


def document(question: str, answer: str) -> str:
    """Problem and solution as plain text, without the calculator annotations.

    >>> document("Two and two?", "2+2=<<2+2=4>>4\\n#### 4")
    'Two and two?\\n2+2=4\\n#### 4'
    """
    return f"{question.strip()}\n{ANNOTATION.sub('', answer).strip()}"


def prepare(data: str, out: Path) -> dict[str, int]:
    """Write documents.jsonl and, the last twentieth, held_out.jsonl; ConfigError if the problems cannot be
    read.
    """
    from rlpretrain.config import DataConfig
    from rlpretrain.data.sources import open_rows, quiet

    source = DataConfig(
        path=data, name=None if Path(data).exists() else "main", column="question", meta_columns=("answer",)
    )
    with quiet():
        texts = [document(row["question"], row["answer"]) for row in open_rows(source)]
    held_out = max(1, round(HELD_OUT * len(texts)))
    out.mkdir(parents=True, exist_ok=True)
    parts = {"documents": texts[:-held_out], "held_out": texts[-held_out:]}
    for name, part in parts.items():
        work = out / f".{name}.jsonl.tmp"
        work.write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
        work.replace(out / f"{name}.jsonl")
    return {name: len(part) for name, part in parts.items()}


def make_base(out: Path, config: PretrainConfig, steps: int, seed: int, quick: bool) -> None:
    """A tokenizer and a small Qwen3 trained on the documents, under `out`/base/model; one made before is
    taken as it is.
    """
    from dataclasses import replace

    from rlpretrain import Pretrainer
    from rlpretrain.config.io import build, to_dict

    if (out / "base" / "model" / "model.safetensors").exists():
        print(f"base model: made before, in {out / 'base'} (--fresh makes it again)")
        return
    shutil.rmtree(out / "base", ignore_errors=True)
    shape = out / "base" / "shape"
    tokenizer = make_tokenizer(out / "documents.jsonl", 512 if quick else VOCABULARY)
    tokenizer.save_pretrained(shape)
    model_config(tokenizer, QUICK_SHAPE if quick else SHAPE).save_pretrained(shape)
    base = build(
        BASE
        | {
            "model": {"path": str(shape), "from_scratch": True},
            "data": to_dict(replace(config.data)),
            "max_steps": steps,
            "output_dir": str(out / "base"),
            "seed": seed,
            "device": config.device,
            "threads": config.threads,
            "console": config.console,
        }
    )
    Pretrainer(base).train()


def make_tokenizer(documents: Path, size: int) -> Any:
    """A byte-level BPE tokenizer of `size` tokens; it has no thought tags, so that RLP adds them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    def texts() -> Iterator[str]:
        with documents.open() as lines:
            yield from (json.loads(line)["text"] for line in lines)

    raw = Tokenizer(models.BPE())
    # Digits one by one, as in most models that calculate.
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        texts(),
        trainers.BpeTrainer(
            vocab_size=size, special_tokens=["<pad>", "<eos>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", clean_up_tokenization_spaces=False
    )


def model_config(tokenizer: Any, shape: dict[str, int]) -> Any:
    """The small Qwen3 (2 million parameters)."""
    from transformers import Qwen3Config

    return Qwen3Config(
        vocab_size=len(tokenizer),
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        attention_dropout=0.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        **shape,
    )


def evaluation(config: PretrainConfig, trained: str | None, out: Path) -> Evaluation:
    """The held-out problems under the trained model (None: the model the run starts from), against the one
    it starts from.
    """
    from dataclasses import replace

    from rlpretrain import models
    from rlpretrain.data.stream import read_all
    from rlpretrain.evaluation.evaluate import evaluate
    from rlpretrain.objectives import load_objective, parse_section
    from rlpretrain.prompts import Delimiters
    from rlpretrain.ranks import join

    section, device = parse_section(config.objective)[1], join(config.device).device
    tags = Delimiters(section.open, section.close)
    frozen, tokenizer, _ = models.load_with_tokenizer(config.model, tags, config.seed)
    model = frozen.to(device)
    if trained:
        model = models.load_with_tokenizer(
            replace(config.model, path=trained, tokenizer=None, revision=None), tags, config.seed
        )[0].to(device)
    data = replace(config.data, path=str(out / "held_out.jsonl"))
    documents = read_all(data, tokenizer, limit=config.eval.documents)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    return evaluate(
        model,
        load_objective(config, tokenizer),
        documents,
        frozen=frozen if trained else None,
        thoughts=config.eval.thoughts,
        seed=config.seed,
        token_budget=config.token_budget,
        pad_id=pad,
    )


def values(found: Evaluation) -> dict[str, Any]:
    """The numbers of every position, with those of MORE."""
    v = found.values
    return v | {"direct_gain": v["gain_frozen"] - v["gain"], "thought_worth": v["gain_frozen"] - v["empty"]}


def numbers(found: Evaluation) -> dict[str, Any]:
    """Means, each with its 95% interval under the same name with `_ci`."""
    from rlpretrain.evaluation.intervals import interval

    summary = found.summary()
    for name in MORE:
        summary[name], summary[f"{name}_ci"] = interval(values(found)[name], rows=found.rows)
    return summary


def change(before: Evaluation, after: Evaluation) -> dict[str, Any]:
    """After minus before at the same positions, with intervals."""
    from rlpretrain.evaluation.intervals import interval

    first, second = values(before), values(after)
    out: dict[str, Any] = {}
    for name in ("gain_frozen", "gain", "thought_worth"):
        out[name], out[f"{name}_ci"] = interval(second[name] - first[name], rows=after.rows)
    return out


def show(results: dict[str, Any]) -> None:
    """One table, and in a sentence what it says."""
    from rich.console import Console
    from rich.table import Table

    from rlpretrain.evaluation.evaluate import MEANING

    def cell(row: dict[str, Any], name: str) -> str:
        low, high = row[f"{name}_ci"]
        return f"{row[name]:.3f} [{low:.3f}, {high:.3f}]"

    title = f"GSM8K, held-out problems, before and after {results['steps']} RLP steps; nats, 95% intervals"
    table = Table("", "before", "after", "meaning", title=title)
    for name in SHOWN:
        table.add_row(
            name, cell(results["before"], name), cell(results["after"], name), (MEANING | MORE)[name]
        )
    console = Console(width=130)
    console.print(table)
    for name, said in {
        "gain_frozen": "Thinking, against the initial model without a thought",
        "thought_worth": "The words of a thought, against an empty one",
    }.items():
        low, high = results["after"][f"{name}_ci"]
        verdict = "helps" if low > 0 else "hurts" if high < 0 else "makes no measurable difference"
        console.print(f"{said}: {verdict}, {cell(results['after'], name)} nats.")


if __name__ == "__main__":
    sys.exit(main())
