"""Memory of a run with LoRA against full training: `python -m benchmarks.lora [--json]`.

Every row is a process of its own: two steps of RLP on a Qwen3 of random weights (hidden 768, 12 layers,
32,000 words, float32), with the hf engine and torch. Memory is the process's peak resident size (VmHWM) minus
what it held before the model was loaded (VmRSS). It includes loading, activations, sampling and the
allocator's slack. `no frozen` uses no frozen model at all (baseline self, frozen_every 0): its difference
from the row above is the cost of a frozen model.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.process_memory import memory_field

LORA = {"r": 16}
FROZEN = {"name": "frozen", "frozen_every": 1}
SELF = {"name": "self", "frozen_every": 0}
ROWS: dict[str, dict[str, Any]] = {
    "all weights, frozen": {"baseline": FROZEN},
    "all weights, no frozen": {"baseline": SELF},
    "LoRA, frozen": {"baseline": FROZEN, "policy": {"lora": LORA}},
    "LoRA, no frozen": {"baseline": SELF, "policy": {"lora": LORA}},
    "DoRA, frozen": {"baseline": FROZEN, "policy": {"lora": LORA | {"use_dora": True}}},
    "LoRA on 4 bits, frozen": {
        "baseline": FROZEN,
        "policy": {"lora": LORA},
        "model": {"quantization": "4bit"},
    },
}
SHAPE = {
    "hidden_size": 768,
    "intermediate_size": 2304,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


def prepare(folder: Path) -> None:
    """The base checkpoint and documents."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from rlpretrain.corpora import dial

    torch.manual_seed(0)
    dial.write(folder, base=4, train=64, held_out=4)
    config = Qwen3Config(vocab_size=32000, bos_token_id=None, eos_token_id=None, **SHAPE)
    Qwen3ForCausalLM(config).save_pretrained(folder / "base")
    dial.tokenizer().save_pretrained(folder / "base")


def measure(folder: Path, row: str) -> dict[str, float]:
    """MB that two steps of a row needed, and that the dry run expects."""
    import torch

    from rlpretrain.config.io import build
    from rlpretrain.tools.dry_run import make_objective, make_sizes, model_shape
    from rlpretrain.tools.memory import memory, peak
    from rlpretrain.training.loop import train
    from rlpretrain.training.run import Run

    torch.set_num_threads(1)
    settings = ROWS[row]
    values = {
        "model": {"path": str(folder / "base"), **settings.get("model", {})},
        "baseline": settings["baseline"],
        "data": {"path": str(folder / "train.jsonl"), "max_length": 64},
        "token_budget": 1024,
        "max_steps": 2,
        "objective": {"name": "rlp", "positions": "after", "marker": "shows"},
        "positions_per_step": 4,
        "sampling": {"thoughts": 4, "max_thought_tokens": 8, "cut": "force_close"},
        "console": False,
        "device": "cpu",
        "policy": {"backend": "torch", **settings.get("policy", {})},
        "checkpoint": {"every": 0},
        "output_dir": str(folder / row.replace(" ", "-")),
    }
    config = build(values)
    objective = make_objective(config, [])
    shape, _ = model_shape(config.model, folder)
    expected = peak(memory(config, shape, make_sizes(config, objective, shape, [])))
    before = memory_field("VmRSS")
    run = Run(config, None)
    train(run)
    weights = 4 * run.parameters
    needed = memory_field("VmHWM") - before
    run.close()
    return {"mb": needed / 2**20, "weights_mb": weights / 2**20, "expected_mb": expected / 2**20}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    parser.add_argument("--one", nargs=2, metavar=("FOLDER", "ROW"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(Path(args.one[0]), args.one[1])))
        return
    results = {}
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name))
        for row in ROWS:
            command = [sys.executable, "-m", "benchmarks.lora", "--one", name, row]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            results[row] = json.loads(done.stdout.splitlines()[-1])
    base = results["all weights, frozen"]["weights_mb"]
    for numbers in results.values():
        numbers["ratio"] = numbers["mb"] / base
    if args.json:
        print(json.dumps(results, indent=1))
        return
    print(f"weights of the model: {base:.0f} MB\n")
    print(f"{'':26s} {'peak, MB':>9s} {'copies of the model':>20s} {'dry run says, MB':>17s}")
    for row, n in results.items():
        print(f"{row:26s} {n['mb']:9.0f} {n['ratio']:20.2f} {n['expected_mb']:17.0f}")


if __name__ == "__main__":
    main()
