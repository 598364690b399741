"""Which architectures train: two steps of RLP on a tiny random model of each, with all weights and with LoRA.

    python -m benchmarks.architectures [--only TEXT] [--json]
    python -m benchmarks.architectures --table FILE     # the table of docs/architectures.md from the JSON

Each model is made from its own configuration class with small sizes, saved, and trained by the library as any
checkpoint would be, in float32 on a CPU. `packing`: trees, or padded rows and why, or why it is refused.
`nats`: the largest difference of a log-probability between trees and padded rows. `engine`: how the engine hf
decodes, and the largest difference of its log-probabilities from those of the whole sequence read at once.
`vllm`: whether the installed vLLM lists the model's class; none is started.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import json
import random
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.architectures_sizes import MODELS, random_model
from rlpretrain.compat import versions, without_notices, without_progress_bars
from rollout.hf import HFEngine
from rollout.types import Prompt, SamplingParams
from tests.builders.tiny import bpe_tokenizer

WORDS = tuple(f"w{i}" for i in range(61))


def prepare(folder: Path) -> Any:
    """The documents that all models read; their tokenizer, to which each run adds the tags of a thought."""
    rng = random.Random(0)
    texts = [" ".join(rng.choices(WORDS, k=30)) for _ in range(32)]
    (folder / "documents.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return bpe_tokenizer(texts)


def train(folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    """What run.json says of two steps; `error` if the library refuses the model or fails."""
    from rlpretrain import Pretrainer
    from rlpretrain.config.io import build

    out = folder / f"run_{'_'.join([name, *changes])}"
    values: dict[str, Any] = {
        "model": str(folder / name),
        "data": {"path": str(folder / "documents.jsonl"), "max_length": 160},
        "objective": {"name": "rlp", "target_length": 8, "positions_per_document": 2},
        "positions_per_step": 4,
        "sampling": {"thoughts": 4, "max_thought_tokens": 8},
        "max_steps": 2,
        "threads": 1,
        "checkpoint": {"every": 0},
        "output_dir": str(out),
    }
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            Pretrainer(build(values | changes)).train()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return json.loads((out / "run.json").read_text())


def sample(model: Any) -> dict[str, Any]:
    """Eight tokens twice after prompts of four lengths: the way of decoding, and the difference in nats."""
    rng, difference, engine = random.Random(0), 0.0, HFEngine(model)
    prompts = [Prompt(tuple(rng.choices(range(3, 60), k=length)), ()) for length in (5, 13, 22, 9)]
    thoughts = asyncio.run(engine.sample(prompts, SamplingParams(8), 2, [0, 1, 2, 3]))
    for prompt, of_prompt in zip(prompts, thoughts, strict=True):
        for thought in of_prompt:
            ids, new = torch.tensor([[*prompt.token_ids, *thought.token_ids]]), len(thought.token_ids)
            with torch.no_grad():
                logps = model(input_ids=ids).logits[0, -new - 1 : -1].log_softmax(-1)
            own = logps.gather(-1, ids[0, -new:, None])[:, 0]
            difference = max(difference, float((own - torch.tensor(thought.behaviour_logps)).abs().max()))
    return {"decoding": engine.health()["path"], "sampled_nats": difference}


def listed_by_vllm() -> set[str]:
    """Names of the classes that the installed vLLM lists; empty without vLLM."""
    try:
        from vllm import ModelRegistry
    except ImportError:
        return set()
    return set(ModelRegistry.get_supported_archs())


def measure(names: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each model."""
    from rlpretrain.tracking.progress import bar

    vllm, rows = listed_by_vllm(), []
    with tempfile.TemporaryDirectory() as temporary, bar("architectures") as show:
        folder = Path(temporary)
        tokenizer = prepare(folder)
        for done, name in enumerate(names):
            show(done, len(names))
            with without_notices(), without_progress_bars():
                try:
                    model = random_model(name, len(tokenizer))
                except Exception as error:
                    rows.append({"model": name, "error": f"cannot be made: {error}"})
                    continue
                model.save_pretrained(folder / name)
                tokenizer.save_pretrained(folder / name)
                cls = type(model).__name__
                facts = found(folder, name) | sample(model)
                rows.append({"model": name, "class": cls} | facts | {"vllm": cls in vllm})
    return rows


def found(folder: Path, name: str) -> dict[str, Any]:
    """What two steps say: packing, difference and LoRA."""
    run = train(folder, name)
    if "error" in run:
        return {"packing": "refused", "why": run["error"]}
    lora = train(folder, name, policy={"lora": {"r": 4}})
    return {
        "packing": "padded" if run["padded_because"] else "tree",
        "why": run["padded_because"],
        "nats": run.get("tree_difference"),
        "lora": lora.get("error", "trains"),
    }


def table(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The rows as lines of Markdown."""
    yield "| type | scored as | LoRA | engine `hf`: way, nats | vLLM lists it |"
    yield "|---|---|---|---|---|"
    for row in rows:
        scored = f"tree, {row['nats']:.1e}" if row["packing"] == "tree" else f"{row['packing']}: {row['why']}"
        decoded = f"{row['decoding'].replace('_', ' ')}, {row['sampled_nats']:.1e}"
        yield f"| {row['model']} | {scored} | {row['lora']} | {decoded} | {'yes' if row['vllm'] else 'no'} |"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Which architectures train, and how.")
    parser.add_argument("--only", default="", metavar="TEXT", help="models whose name contains it")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the table of a JSON file")
    options = parser.parse_args(argv)
    if options.table:
        print("\n".join(table(json.loads(options.table.read_text())["rows"])))
        return
    rows = measure([name for name in MODELS if options.only in name])
    if options.json:
        print(json.dumps({"benchmark": "architectures", "versions": versions(), "rows": rows}, indent=1))
        return
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
