"""Steps with new weights that wait for thoughts, over steps with weights that reach thoughts in flight."""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.rollout_setup import HIDDEN_128, make_model, train
from rlpretrain.corpora import dial
from tests.builders.servers import VLLMServer

KINDS = ("drained", "in_flight")
WARM_UP, LONGEST = 4, 200
MEASURED = (
    "step_time",
    "perf/rollout_s",
    "perf/train_s",
    "perf/sync_s",
    "sample/staleness_mean",
    "sample/token_staleness_mean",
    "sample/updated_frac",
    "completions/mean_length",
)


def updates(rounds: int = 3, steps: int = 14) -> dict[str, Any]:
    """Medians over the steps of runs with one vLLM server, two steps ahead, in turns.

    The random model closes a thought about as often as it draws any other of its few words, so some thoughts
    are several times as long as most.
    """
    torch.set_num_threads(1)
    runs: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder / "base", **HIDDEN_128, vocab_size=len(dial.WORDS))
        dial.write(folder / "data", base=10, train=2000, held_out=10, seed=0)
        dial.tokenizer().save_pretrained(folder / "base")
        server = VLLMServer(folder / "base", folder / "server.log").start().ready()
        try:
            for turn in range(rounds):
                for kind in KINDS:
                    runs[kind].append(_run(folder, f"{kind}-{turn}", server.url, kind, steps))
        finally:
            server.kill()
    pairs = zip(runs["in_flight"], runs["drained"], strict=True)
    ratios = [ours["step_time"] / theirs["step_time"] for ours, theirs in pairs]
    medians = {
        kind: {key: statistics.median(row[key] for row in rows) for key in MEASURED}
        for kind, rows in runs.items()
    }
    return {"in_flight_over_drained": statistics.median(ratios), "ratios": ratios, **medians}


def _run(folder: Path, name: str, url: str, kind: str, steps: int) -> dict[str, float]:
    """Medians over the steps of one run."""
    rows = train(
        folder,
        name,
        folder / "data" / "train.jsonl",
        engine={
            "name": "vllm_server",
            "urls": [url],
            "block_size": 32,
            "max_staleness": 2,
            "in_flight": 4,
            "updates": kind,
        },
        sampling={"thoughts": 4, "max_thought_tokens": LONGEST, "cut": "force_close"},
        positions_per_step=16,
        stop={"collapse": False},
        max_steps=steps,
        threads=1,
    )
    return {key: statistics.median(row.get(key, 0.0) for row in rows[WARM_UP:]) for key in MEASURED}
