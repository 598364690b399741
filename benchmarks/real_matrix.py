"""Every method takes 20 steps on SmolLM2-135M and GSM8K: through hf and vLLM, all weights and LoRA, and TRL.

    python -m benchmarks.real_matrix [--steps 20] [--only TEXT] [--device cuda]
    [--dtype bfloat16] [--out FOLDER] [--json]

Each row is a process of its own: seconds of a step, peak memory (on a GPU that of tensors), and the memory
that `--dry-run` promised for it. Rows that are done are kept under --out, so an interrupted call continues.
`scripts/setup.sh real-cpu` installs the checkpoint.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.process_memory import PeakMemory, memory_field
from benchmarks.real_matrix_methods import BESIDE, ENGINES, METHODS, ONE_ENGINE, WEIGHTS, WHERE
from examples.gsm8k_calculations import LINES, read_calculations, write_rows
from examples.smollm2_checkpoint import make_checkpoint

GIB = 2**30


@dataclass(frozen=True)
class How:
    """Steps of a row, its device, and the precision of its weights."""

    steps: int
    device: str = "cpu"
    dtype: str = "float32"


def main(argv: list[str] | None = None) -> int:
    """Run the rows that are not done, and print all that are."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--only", default="", help="rows whose name has this text")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", default="float32", help="precision of the weights, also the engine's")
    parser.add_argument("--out", type=Path, default=Path("runs/real_matrix"))
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.row:
        return run_row(args.row, args.out, How(args.steps, args.device, args.dtype))
    make_checkpoint(args.out / "checkpoint")
    write_documents(args.out / "documents.jsonl")
    names = [name for name in rows() if args.only in name]
    for i, name in enumerate(names):
        if not file_of(args.out, name).exists():
            print(f"{i + 1} of {len(names)}: {name} ...", file=sys.stderr, flush=True)
            command = [sys.executable, "-m", "benchmarks.real_matrix", "--row", name]
            command += ["--out", str(args.out), "--steps", str(args.steps), "--device", args.device]
            command += ["--dtype", args.dtype]
            with (args.out / "log.txt").open("a") as log:
                subprocess.run(command, stdout=log, stderr=log, check=False)
    done = [
        json.loads(file_of(args.out, name).read_text()) for name in names if file_of(args.out, name).exists()
    ]
    if args.json:
        print(json.dumps({"rows": done}))
    else:
        show(done)
    return int(any(row["fault"] for row in done) or len(done) < len(names))


def write_documents(path: Path, sentences: int = 3) -> None:
    """Documents of a few sentences: some methods predict a sentence from those before it."""
    texts = [calculation.document["text"] for calculation in read_calculations(LINES)]
    groups = [texts[first : first + sentences] for first in range(0, len(texts), sentences)]
    labelled = [text.partition("=") for text in texts[:256]]
    write_rows(
        path.with_name("labelled.jsonl"),
        [{"question": f"{q} =", "answer": a.strip()} for q, _, a in labelled],
    )
    write_rows(
        path, [{"text": "\n".join(group), "score": number % 10 / 10} for number, group in enumerate(groups)]
    )


def rows() -> Iterator[str]:
    """method / trainer or engine / weights."""
    for method in METHODS:
        for engine in ENGINES if not method.startswith(ONE_ENGINE) else ["hf"]:
            for weights in WEIGHTS:
                yield f"{method} / {engine} / {weights}"
    for weights in WEIGHTS:
        yield f"rlp / trl / {weights}"


def file_of(out: Path, name: str) -> Path:
    """Where a row's numbers stand."""
    plain = "".join(letter if letter.isalnum() else "-" for letter in name)
    return out / f"{plain}.json"


def run_row(name: str, out: Path, how: How) -> int:
    """Train one row in this process and write its numbers, or its fault."""
    torch.set_num_threads(1)
    method, engine, weights = name.split(" / ")
    row: dict[str, Any] = {"name": name, "steps": how.steps, "fault": None}
    folder = out / file_of(out, name).stem
    shutil.rmtree(folder, ignore_errors=True)  # of a call that was interrupted
    try:
        train = train_with_trl if engine == "trl" else train_natively
        row |= train(method, engine, weights, folder, how)
    except Exception as error:
        traceback.print_exc()
        row["fault"] = f"{type(error).__name__}: {error}"
    file_of(out, name).write_text(json.dumps(row))
    return 0


def settings(method: str, engine: str, weights: str, folder: Path, how: How) -> dict[str, Any]:
    """The configuration of a row: two positions with four thoughts of up to eight tokens."""
    values: dict[str, Any] = {
        "model": {"path": str(folder.parent / "checkpoint"), "dtype": how.dtype},
        "data": {"path": str(folder.parent / "documents.jsonl"), "max_length": 128, "long": "truncate"},
        "objective": fill(METHODS[method], folder.parent),
        "positions_per_step": 2,
        "sampling": {"thoughts": 4, "max_thought_tokens": 8, "cut": "force_close"},
        "optim": {"lr": 2e-5},
        "loss": {"ntp_coef": 0.5},
        "policy": {"backend": "torch"},
        "max_steps": how.steps,
        "token_budget": 2048,
        "threads": 1,
        "device": how.device,
        "console": False,
        "checkpoint": {"every": 0},
        "output_dir": str(folder),
    }
    for changes in (ENGINES.get(engine, {}), WEIGHTS[weights], fill(BESIDE.get(method, {}), folder.parent)):
        for section, fields in changes.items():
            values[section] = values.get(section, {}) | fields
    return values


def fill(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Settings with the paths of what was made in the folder."""
    text = json.dumps(settings).replace("{checkpoint}", str(folder / "checkpoint"))
    return json.loads(text.replace("{labelled}", str(folder / "labelled.jsonl")))


def train_natively(method: str, engine: str, weights: str, folder: Path, how: How) -> dict[str, Any]:
    """A row of the library's own trainer."""
    from rlpretrain import Pretrainer
    from rlpretrain.config.io import build

    config = build(settings(method, engine, weights, folder, how))
    promised = promise(config)
    PeakMemory().start()
    Pretrainer(config).train()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "seconds": statistics.median(line["step_time"] for line in lines),
        "peak_gib": peak_gib(how.device),
        "promised_gib": promised / GIB,
        "trained": len(lines),
        "thought": sum("policy_loss" in line for line in lines),
    }


async def judge(prompts: Sequence[str]) -> list[str | None]:
    """Verdicts by the length of the prompt: a judge that costs nothing."""
    return [f"Score: {len(prompt) % 2}" for prompt in prompts]


def promise(config: Any) -> float:
    """The peak in bytes that `--dry-run` prints for this configuration."""
    from rlpretrain.tools.dry_run import make_objective, model_shape
    from rlpretrain.tools.memory import memory, peak
    from rlpretrain.tools.sizes import make_sizes, measure_documents

    notes: list[str] = []
    objective = make_objective(config, notes)
    shape, _ = model_shape(config.model, Path())
    longest = measure_documents(config, objective, notes)
    return peak(memory(config, shape, make_sizes(config, objective, shape, notes, longest)))


def train_with_trl(method: str, engine: str, weights: str, folder: Path, how: How) -> dict[str, Any]:
    """A row of `RLPTrainer`."""
    from datasets import load_dataset
    from peft import LoraConfig

    from rlpretrain.trl import RLPConfig, RLPTrainer

    args = RLPConfig(
        output_dir=str(folder),
        positions=WHERE["positions"],
        marker=WHERE["marker"],
        target_length=WHERE["target_length"],
        max_length=128,
        max_completion_length=8,
        num_generations=4,
        per_device_train_batch_size=8,
        max_steps=how.steps,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=how.device == "cpu",
        bf16=False,
        model_init_kwargs={"dtype": how.dtype},
        disable_tqdm=True,
    )
    data = load_dataset("json", data_files=str(folder.parent / "documents.jsonl"), split="train")
    adapter = LoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM") if weights == "lora" else None
    PeakMemory().start()
    trainer = RLPTrainer(
        str(folder.parent / "checkpoint"), args=args, train_dataset=data, peft_config=adapter
    )
    trainer.train()
    times = [entry["step_time"] for entry in trainer.state.log_history if "step_time" in entry]
    return {
        "seconds": statistics.median(times),
        "peak_gib": peak_gib(how.device),
        "promised_gib": None,
        "trained": trainer.state.global_step,
    }


def peak_gib(device: str) -> float:
    """The peak of this process's memory, or of its tensors on a GPU."""
    return (memory_field("VmHWM") if device == "cpu" else torch.cuda.max_memory_allocated(device)) / GIB


def show(done: list[dict[str, Any]]) -> None:
    """One line a row."""
    table = Table("method / engine / weights", "steps", "s a step", "peak GiB", "promised GiB", "fault")
    for row in done:
        numbers = [row.get(name) for name in ("seconds", "peak_gib", "promised_gib")]
        cells = ["" if number is None else f"{number:.2f}" for number in numbers]
        table.add_row(row["name"], str(row.get("trained", "")), *cells, row["fault"] or "")
    Console(width=150).print(table)


if __name__ == "__main__":
    sys.exit(main())
