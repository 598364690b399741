"""The steps that `benchmarks.step` compares, each run in the present process: ours and TRL's."""

from __future__ import annotations

import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.process_memory import PeakMemory
from benchmarks.step_inputs import OPEN, TOKEN_BUDGET, Shape, count_tokens, make_batch
from rlpretrain.objectives import rlp
from rollout import Document
from rollout.store import Store


class ScoredFirst(rlp.RLP):
    """RLP that asks for the rewards of the whole batch before it trains: two passes."""

    needs = rlp.RLP.needs | {"batch"}


def measure_steps(kind: str, folder: Path, shape: Shape, steps: int, threads: int) -> dict[str, Any]:
    """Median seconds and memory growth of the steps after the first (of a single step: that one)."""
    torch.set_num_threads(threads)
    peak = PeakMemory()
    if kind == "trl":
        seconds = run_trl(folder, shape, steps, peak)
    else:
        start_after_first_step(peak)
        seconds = run_ours(kind, folder, shape, steps)
    return {"seconds": statistics.median(seconds[1:] or seconds), "bytes": peak.growth()}


def start_after_first_step(peak: PeakMemory) -> None:
    """Start `peak` when a run of ours has finished its first step."""
    from rlpretrain.training.run import Run

    finish = Run.finish

    def finish_and_start(run: Run, step: int, batch: Any) -> None:
        finish(run, step, batch)
        if step == 1:
            peak.start()

    Run.finish = finish_and_start  # type: ignore[method-assign]


def run_ours(kind: str, folder: Path, shape: Shape, steps: int) -> list[float]:
    """Seconds of each step of a run of ours."""
    from rlpretrain import Pretrainer
    from rlpretrain.config.io import build

    values: dict[str, Any] = {
        "model": str(folder / "model"),
        "data": {"path": str(folder / "documents.jsonl"), "max_length": shape.document},
        "objective": "ntp",
        "max_steps": steps,
        "token_budget": TOKEN_BUDGET,
        "policy": {"backend": "torch"},
        "device": "cpu",
        "checkpoint": {"every": 0},
        "stop": {"collapse": False},
        "console": False,
        "output_dir": str(folder / f"run-{kind}"),
        "optim": {"lr": 1e-6},
        "packing": "padded" if kind in ("padded", "scored_first") else "tree",
        "positions_per_step": max(1, count_tokens(shape, "tree") // shape.document),
    }
    if kind != "ntp":
        name = "benchmarks.step_runs:ScoredFirst" if kind == "scored_first" else "rlp"
        values |= {
            "objective": {"name": name, "target_length": shape.target},
            "replay": str(write_rollouts(folder / f"rollouts-{kind}", shape, steps)),
            "sampling": {"thoughts": shape.thoughts, "max_thought_tokens": shape.thought},
            "positions_per_step": shape.positions,
            "baseline": {"frozen_every": 0},
        }
    Pretrainer(build(values)).train()
    rows = [json.loads(line) for line in (folder / f"run-{kind}" / "metrics.jsonl").read_text().splitlines()]
    return [row["step_time"] for row in rows]


def write_rollouts(folder: Path, shape: Shape, steps: int) -> Path:
    """Store the thoughts of every step as a run with `save_rollouts` would; the store's folder."""
    store = Store(folder)
    for step in range(1, steps + 1):
        ids, groups = make_batch(shape, step - 1)
        store.write(step, groups, [Document(f"d{step - 1}", tuple(ids))], {"shares_weights": True})
    return store.folder


class Gain:
    """The information gain as a reward function of TRL, scored with the live model."""

    __name__ = "information_gain"

    def __init__(self) -> None:
        self.model: Any = None

    def sum_logps(self, rows: list[list[int]], sizes: list[int]) -> torch.Tensor:
        """log p of the last `sizes[i]` tokens of each row, summed.

        Rows are padded and batched; only the last tokens go through the fused head.
        """
        width = max(map(len, rows))
        if len(rows) * width > TOKEN_BUDGET and len(rows) > 1:
            half = len(rows) // 2
            first, second = (rows[:half], sizes[:half]), (rows[half:], sizes[half:])
            return torch.cat([self.sum_logps(*first), self.sum_logps(*second)])
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        labels = torch.full_like(ids, -100)
        for i, (row, size) in enumerate(zip(rows, sizes, strict=True)):
            labels[i, len(row) - size : len(row)] = ids[i, len(row) - size : len(row)]
        output = self.model(
            input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True, use_cache=False
        )
        logps = output.log_probs.nan_to_num(0.0)
        return logps.masked_fill(labels[:, -logps.shape[1] :] == -100, 0.0).sum(-1)

    @torch.no_grad()
    def __call__(
        self, completion_ids: list[list[int]], context: list[list[int]], target: list[list[int]], **_: Any
    ) -> list[float]:
        """The target's log-probs after each thought, minus those without one."""
        rows = [[*c, OPEN, *t, *x] for c, t, x in zip(context, completion_ids, target, strict=True)]
        with_thought = self.sum_logps(rows, [len(x) for x in target])
        unique = {tuple(c): [*c, *x] for c, x in zip(context, target, strict=True)}
        base_logps = self.sum_logps(list(unique.values()), [len(target[0])] * len(unique)).tolist()
        base = dict(zip(unique, base_logps, strict=True))
        return [float(a) - base[tuple(c)] for a, c in zip(with_thought, context, strict=True)]


def run_trl(folder: Path, shape: Shape, steps: int, peak: PeakMemory) -> list[float]:
    """Seconds of each step of TRL's trainer."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    seconds: list[float] = []
    batches = itertools.count()
    gain = Gain()

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: Any, model: Any = None, **__: Any) -> None:
            gain.model = model

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.begin = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(time.perf_counter() - self.begin)
            if len(seconds) == 1 and steps > 1:
                peak.start()

    def stored_thoughts(prompts: list[str], trainer: Any) -> dict[str, list[Any]]:
        _, groups = make_batch(shape, next(batches))
        pairs = [(group, thought) for group in groups for thought in group.thoughts]
        assert len(prompts) == len(pairs)
        return {
            "prompt_ids": [list(g.prompt.token_ids) for g, _ in pairs],
            "completion_ids": [list(t.token_ids) for _, t in pairs],
            "logprobs": [list(t.behaviour_logps) for _, t in pairs],
            "context": [list(g.position.context_ids) for g, _ in pairs],
            "target": [list(g.position.target_ids) for g, _ in pairs],
        }

    thoughts = shape.positions * shape.thoughts
    parts = count_trl_parts(shape)
    config = GRPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=thoughts // parts,
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
        rollout_func=stored_thoughts,
        train_dataset=Dataset.from_dict({"prompt": [f"w{i}" for i in range(shape.positions * steps)]}),
    )
    if steps == 1:
        peak.start()
    trainer.train()
    return seconds


def count_trl_parts(shape: Shape) -> int:
    """The fewest equal micro-batches of a TRL step that stay within the token budget."""
    thoughts = shape.positions * shape.thoughts
    longest = shape.position_index(shape.positions - 1) + 1 + shape.thought
    sizes = range(1, thoughts + 1)
    return next(k for k in sizes if thoughts % k == 0 and thoughts // k * longest <= TOKEN_BUDGET)
