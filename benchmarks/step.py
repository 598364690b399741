"""One optimization step on the same thoughts: packed trees against padded rows, TRL, and next-token
training.

    python -m benchmarks.step [--grid | --curves] [--rounds 3] [--json]
                              [--shape document=2048 thoughts=16 thought=256]
    python -m benchmarks.step --plot benchmarks/results

- tree: `packing: tree`, with rewards, policy loss, reader term and next-token loss in one pass.
- padded: the same in one pass over padded rows; `scored_first` scores all thoughts in a separate pass before
  it trains.
- trl: TRL's GRPOTrainer (fused head) with an information-gain reward that scores with the live model,
  batched, without gradient.
- ntp: next-token training on documents of the same length, which gives the cost of a token.

The model has the shape of Qwen3 and runs in float32 on random documents and random thoughts. Each kind and
round runs in a process of its own, in turns. The figures are medians of the ratios within a round. All kinds
have the same token budget for a micro-batch. Memory is the peak of the steps after the first, minus what the
process held when they began (weights and optimizer states); malloc returns its free memory before that is
measured.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from rlpretrain.objectives import rlp
from rollout import Document, FinishReason, Group, Position, Prompt, Thought
from rollout.store import Store
from tests.builders.tiny import word_tokenizer

KINDS = ("tree", "padded", "scored_first", "trl", "ntp")
CLOSE, FIRST = 4, 5  # <think> 3, </think> 4; words from 5
BUDGET = 32768
"""Tokens of a micro-batch, padding included."""


@dataclass(frozen=True)
class Shape:
    """What is measured: tokens, and counts of positions and thoughts."""

    document: int = 512
    positions: int = 4
    thoughts: int = 8
    thought: int = 64
    target: int = 16
    hidden: int = 512
    layers: int = 3
    vocabulary: int = 8192


GRID = [
    Shape(document=d, thoughts=g, thought=t) for d in (512, 1024, 2048) for g in (8, 16) for t in (64, 256)
]
CURVES = {"thoughts": (2, 4, 8, 16, 32), "vocabulary": (2048, 8192, 32768, 131072)}


class ScoredFirst(rlp.RLP):
    """RLP that wants the rewards of the whole batch before it trains: two passes."""

    needs = rlp.RLP.needs | {"batch"}


def make(folder: Path, shape: Shape) -> None:
    """Model, tokenizer, and one document with its groups, stored as rollouts of as many steps as are
    timed.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    heads = shape.hidden // 64
    config = AutoConfig.for_model(
        "qwen3",
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=3 * shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=64,
        max_position_embeddings=2 * shape.document + shape.thought + 64,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    word_tokenizer(
        ["<think>", "</think>", *(f"w{i}" for i in range(shape.vocabulary - FIRST))]
    ).save_pretrained(folder / "model")
    with (folder / "documents.jsonl").open("w") as lines:
        for d in range(64):
            words = random.Random(f"document {d}").choices(range(shape.vocabulary - FIRST), k=shape.document)
            lines.write(json.dumps({"text": " ".join(f"w{w}" for w in words)}) + "\n")


def batch(shape: Shape, step: int) -> tuple[tuple[int, ...], list[Group]]:
    """(document, its groups) of a step: positions spread evenly, every thought of full length and closed."""
    rng = random.Random(step)

    def words(n: int) -> tuple[int, ...]:
        return tuple(rng.choices(range(FIRST, shape.vocabulary), k=n))

    ids, groups = words(shape.document), []
    for p in range(shape.positions):
        at = (2 * p + 1) * shape.document // (2 * shape.positions)
        position = Position(f"d{step}", at, ids[:at], ids[at : at + shape.target])
        thoughts = tuple(
            Thought((*words(shape.thought - 1), CLOSE), (-9.0,) * shape.thought, FinishReason.CLOSE, step, g)
            for g in range(shape.thoughts)
        )
        groups.append(
            Group(f"d{step}@{at}", position, Prompt((*ids[:at], 3), (CLOSE,), (CLOSE,)), thoughts, step)
        )
    return ids, groups


def ours(kind: str, folder: Path, shape: Shape, steps: int) -> list[float]:
    """Seconds of each step of a run of ours."""
    from rlpretrain import Pretrainer
    from rlpretrain.config.io import build

    values: dict[str, Any] = {
        "model": str(folder / "model"),
        "data": {"path": str(folder / "documents.jsonl"), "max_length": shape.document},
        "objective": "ntp",
        "max_steps": steps,
        "token_budget": BUDGET,
        "policy": {"backend": "torch"},
        "device": "cpu",
        "checkpoint": {"every": 0},
        "stop": {"collapse": False},
        "console": False,
        "output_dir": str(folder / f"run-{kind}"),
        "optim": {"lr": 1e-6},
        "packing": "padded" if kind in ("padded", "scored_first") else "tree",
        "positions_per_step": max(1, tokens(shape, "tree") // shape.document),
    }
    if kind != "ntp":
        store = Store(folder / f"rollouts-{kind}")
        for step in range(1, steps + 1):
            ids, groups = batch(shape, step - 1)
            store.write(step, groups, [Document(f"d{step - 1}", tuple(ids))], {"shares_weights": True})
        name = "benchmarks.step:ScoredFirst" if kind == "scored_first" else "rlp"
        values |= {
            "objective": {"name": name, "target_length": shape.target},
            "replay": str(store.folder),
            "sampling": {"thoughts": shape.thoughts, "max_thought_tokens": shape.thought},
            "positions_per_step": shape.positions,
            "baseline": {"frozen_every": 0},
        }
    Pretrainer(build(values)).train()
    rows = [json.loads(line) for line in (folder / f"run-{kind}" / "metrics.jsonl").read_text().splitlines()]
    return [row["step_time"] for row in rows]


class Gain:
    """The information gain as a reward function of TRL: targets after a thought, less those without one,
    live model.
    """

    __name__ = "information_gain"

    def __init__(self) -> None:
        self.model: Any = None

    def logps(self, rows: list[list[int]], sizes: list[int]) -> torch.Tensor:
        """log p of the last tokens of each row, summed: padded batches, only these rows through the fused
        head.
        """
        width = max(map(len, rows))
        if len(rows) * width > BUDGET and len(rows) > 1:
            half = len(rows) // 2
            return torch.cat([self.logps(rows[:half], sizes[:half]), self.logps(rows[half:], sizes[half:])])
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        labels = torch.full_like(ids, -100)
        for i, (row, size) in enumerate(zip(rows, sizes, strict=True)):
            labels[i, len(row) - size : len(row)] = ids[i, len(row) - size : len(row)]
        out = self.model(
            input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True, use_cache=False
        )
        return (
            out.log_probs.nan_to_num(0.0)
            .masked_fill(labels[:, -out.log_probs.shape[1] :] == -100, 0.0)
            .sum(-1)
        )

    @torch.no_grad()
    def __call__(
        self, completion_ids: list[list[int]], context: list[list[int]], target: list[list[int]], **_: Any
    ) -> list[float]:
        after = [[*c, 3, *t, *x] for c, t, x in zip(context, completion_ids, target, strict=True)]
        unique = {tuple(c): [*c, *x] for c, x in zip(context, target, strict=True)}
        with_thought = self.logps(after, [len(x) for x in target])
        base = dict(
            zip(
                unique,
                self.logps(list(unique.values()), [len(target[0])] * len(unique)).tolist(),
                strict=True,
            )
        )
        return [float(a) - base[tuple(c)] for a, c in zip(with_thought, context, strict=True)]


def trl(folder: Path, shape: Shape, steps: int) -> list[float]:
    """Seconds of each step of TRL's trainer."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    times: list[float] = []
    gain, seen = Gain(), [0]

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: Any, model: Any = None, **__: Any) -> None:
            gain.model = model

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.begin = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter() - self.begin)
            if len(times) == 1 and steps > 1:
                watch()

    def thoughts(prompts: list[str], trainer: Any) -> dict[str, list[Any]]:
        _, groups = batch(shape, seen[0])
        seen[0] += 1
        made = [(g, t) for g in groups for t in g.thoughts]
        assert len(prompts) == len(made)
        return {
            "prompt_ids": [list(g.prompt.token_ids) for g, _ in made],
            "completion_ids": [list(t.token_ids) for _, t in made],
            "logprobs": [list(t.behaviour_logps) for _, t in made],
            "context": [list(g.position.context_ids) for g, _ in made],
            "target": [list(g.position.target_ids) for g, _ in made],
        }

    size = shape.positions * shape.thoughts
    longest = (2 * shape.positions - 1) * shape.document // (2 * shape.positions) + 1 + shape.thought
    parts = next(k for k in range(1, size + 1) if size % k == 0 and size // k * longest <= BUDGET)
    config = GRPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=size // parts,
        num_generations=shape.thoughts,
        max_steps=steps,
        max_completion_length=shape.thought,
        gradient_accumulation_steps=parts,
        num_iterations=1,
        beta=0.0,
        learning_rate=1e-6,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        report_to="none",
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
        shuffle_dataset=False,
        scale_rewards="none",
        loss_type="grpo",
        use_vllm=False,
    )
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32),
        reward_funcs=gain,
        args=config,
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        callbacks=[Clock()],
        rollout_func=thoughts,
        train_dataset=Dataset.from_dict({"prompt": [f"w{i}" for i in range(shape.positions * steps)]}),
    )
    if steps == 1:
        watch()
    trainer.train()
    return times


def tokens(shape: Shape, kind: str) -> int:
    """Tokens of a step that go through the model, padding included, as we lay them out."""
    from rlpretrain.scoring.packing import Layout, count, pack
    from rlpretrain.types import Batch, Document

    ids, groups = batch(shape, 0)
    whole = Batch(tuple(groups), (Document("d0", ids),))
    return sum(m.input_ids.numel() for m in pack(whole, Layout(BUDGET, tree=kind == "tree"), count(whole)))


_held: list[int] = []


def watch() -> None:
    """Start to watch the peak of memory."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    _held.append(_status("VmRSS"))


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))


def one(kind: str, folder: Path, shape: Shape, steps: int, threads: int) -> dict[str, Any]:
    """A kind in this process: seconds of its steps but the first (of one step, that), and the peak of memory
    beyond what it held before them.
    """
    torch.set_num_threads(threads)
    if kind != "trl":
        from rlpretrain.training.run import Run

        finish = Run.finish

        def watched(run: Run, step: int, batch: Any) -> None:
            finish(run, step, batch)
            if step == 1:
                watch()

        Run.finish = watched  # type: ignore[method-assign]
    seconds = trl(folder, shape, steps) if kind == "trl" else ours(kind, folder, shape, steps)
    seconds = seconds[1:] or seconds
    return {"seconds": statistics.median(seconds), "bytes": _status("VmHWM") - _held[0]}


def measure(
    shape: Shape,
    rounds: int,
    steps: int,
    threads: int,
    kinds: Sequence[str] = KINDS,
    trl_steps: int | None = None,
) -> dict[str, Any]:
    """All kinds, in turns."""
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
    for turn in range(rounds):
        for kind in kinds[turn % len(kinds) :] + kinds[: turn % len(kinds)]:
            with tempfile.TemporaryDirectory() as name:
                make(Path(name), shape)
                task = {
                    "kind": kind,
                    "folder": name,
                    "shape": asdict(shape),
                    "threads": threads,
                    "steps": trl_steps if kind == "trl" and trl_steps else steps,
                }
                command = [sys.executable, "-m", "benchmarks.step", "--one", json.dumps(task)]
                done = subprocess.run(
                    command,
                    capture_output=True,
                    text=True,
                    env=os.environ | {"OMP_NUM_THREADS": str(threads)},
                )
                if done.returncode:
                    raise SystemExit(f"{kind}: {done.stderr[-3000:]}")
                found[kind].append(json.loads(done.stdout.splitlines()[-1]))
                print(f"{kind} {found[kind][-1]}", file=sys.stderr, flush=True)

    def ratio(a: str, b: str, what: str = "seconds") -> float:
        return statistics.median(x[what] / y[what] for x, y in zip(found[a], found[b], strict=True))

    own, padded = tokens(shape, "tree"), tokens(shape, "padded")
    plain = max(1, own // shape.document) * shape.document
    out: dict[str, Any] = {
        "shape": asdict(shape),
        "tokens": {"tree": own, "padded": padded},
        "token_ratio": padded / own,
    }
    out["seconds"] = {kind: statistics.median(x["seconds"] for x in rows) for kind, rows in found.items()}
    out["mib"] = {kind: statistics.median(x["bytes"] for x in rows) / 2**20 for kind, rows in found.items()}
    out |= {
        f"ratio_{kind}": ratio(kind, "tree")
        for kind in ("padded", "scored_first")
        if {"tree", kind} <= set(found)
    }
    if {"tree", "ntp"} <= set(found):
        out["token_cost"] = ratio("tree", "ntp") * plain / own
    if {"tree", "trl"} <= set(found):
        out |= {"ratio_trl": ratio("trl", "tree"), "memory_ratio_trl": ratio("tree", "trl", "bytes")}
    return out


def plot(folder: Path) -> None:
    """step.svg from the results in `folder`: ratios over the grid, and what a step costs as thoughts and
    vocabulary grow.
    """
    import matplotlib.pyplot as plt

    grid = json.loads((folder / "step-grid.json").read_text())["grid"]
    curves = json.loads((folder / "step-curves.json").read_text())["curves"]
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    for thoughts in (8, 16):
        for thought in (64, 256):
            rows = [r for r in grid if (r["shape"]["thoughts"], r["shape"]["thought"]) == (thoughts, thought)]
            axes[0].plot(
                [r["shape"]["document"] for r in rows],
                [r["ratio_trl"] for r in rows],
                marker="o",
                label=f"{thoughts} thoughts of {thought}",
            )
    axes[0].set(
        title="TRL's step over ours",
        xlabel="document (tokens)",
        ylabel="times",
        xticks=(512, 1024, 2048),
        ylim=0,
    )
    axes[0].legend(frameon=False, loc="upper left")
    for axis, name in zip(axes[1:], CURVES, strict=True):
        where = [r["shape"][name] for r in curves[name]]
        axis.plot(where, [r["seconds"]["tree"] for r in curves[name]], marker="o", label="seconds")
        axis.plot(
            where,
            [r["mib"]["tree"] / 1024 for r in curves[name]],
            marker="s",
            label="GiB beyond weights and Adam",
        )
        axis.set(title=f"a step of ours by {name}", xlabel=name, ylim=0)
        axis.legend(frameon=False)
    figure.savefig(folder / "step.svg", metadata={"Date": None})


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description="One optimisation step: tree, padded, TRL, next-token training."
    )
    parser.add_argument(
        "--shape", nargs="+", default=[], metavar="NAME=N", help=", ".join(f.name for f in fields(Shape))
    )
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument(
        "--grid", action="store_true", help="documents 512 to 2048, 8 and 16 thoughts of 64 and 256 tokens"
    )
    parser.add_argument(
        "--curves", action="store_true", help="the tree alone, over thoughts and over vocabulary"
    )
    parser.add_argument(
        "--plot", type=Path, help="draw step.svg from step-grid.json and step-curves.json in this folder"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="the first warms up")
    parser.add_argument(
        "--trl-steps", type=int, help="for TRL; 1: its first step is timed, no warm-up (large shapes)"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.one:
        task = json.loads(options.one)
        said = one(task["kind"], Path(task["folder"]), Shape(**task["shape"]), task["steps"], task["threads"])
        return print(json.dumps(said))
    if options.plot:
        return plot(options.plot)
    shape = replace(Shape(), **{k: int(v) for k, v in (pair.split("=") for pair in options.shape)})

    def found(shapes: Sequence[Shape], kinds: Sequence[str] = options.kinds) -> list[dict[str, Any]]:
        return [
            measure(s, options.rounds, options.steps, options.threads, kinds, options.trl_steps)
            for s in shapes
        ]

    said: dict[str, Any] = {
        "benchmark": "step",
        "torch": torch.__version__,
        "threads": options.threads,
        "rounds": options.rounds,
    }
    if options.curves:
        said["curves"] = {
            n: found([replace(shape, **{n: k}) for k in values], ["tree"]) for n, values in CURVES.items()
        }
    elif options.grid:
        said["grid"] = found(GRID)
    else:
        said |= found([shape])[0]
    print(json.dumps(said) if options.json else json.dumps(said, indent=1))


if __name__ == "__main__":
    main()
