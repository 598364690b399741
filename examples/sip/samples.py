"""How good the continuations are that models of the sip examples write: the judge's axis, by the truth.

A sample is right if it is the whole true trace, and its quality is the share that is right before its first
wrong word (`rlpretrain.corpora.dial_judge.quality`).

    python -m examples.sip.samples runs/sip/compare --data runs/sip/held_out.jsonl
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.trained_models import measure_models
from rlpretrain.corpora.dial_judge import quality
from rollout import HFEngine, Prompt, SamplingParams

LONGEST = 16
"""Tokens of a continuation, as the examples train it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Print and write {"right", "quality"} of each trained model under a folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="run, or output_dir of a comparison")
    parser.add_argument("--data", type=Path, required=True, help="held-out questions, as JSON lines")
    parser.add_argument("--samples", type=int, default=4, help="for each question")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    questions = [json.loads(line)["question"] for line in args.data.read_text().splitlines()]
    measure_models(args.folder, lambda model: measure(model, questions, args.samples, args.seed))
    return 0


def measure(folder: Path, questions: Sequence[str], samples: int, seed: int) -> dict[str, float]:
    """The share of right samples, and the mean quality of all, at temperature 1."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    engine = HFEngine(AutoModelForCausalLM.from_pretrained(folder).eval())
    stop = tokenizer.convert_tokens_to_ids(".")
    prompts = [Prompt(tuple(tokenizer(text).input_ids), stop_ids=(stop,)) for text in questions]
    params = SamplingParams(LONGEST, eos_ids=(tokenizer.eos_token_id,))
    groups = asyncio.run(engine.sample(prompts, params, samples, range(seed, seed + len(prompts))))
    scores = [
        quality(question, tokenizer.decode(list(thought.token_ids), skip_special_tokens=True))
        for question, group in zip(questions, groups, strict=True)
        for thought in group
    ]
    return {"right": sum(score == 1 for score in scores) / len(scores), "quality": sum(scores) / len(scores)}


if __name__ == "__main__":
    raise SystemExit(main())
