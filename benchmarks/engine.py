"""The engine against batched `model.generate`: `python -m benchmarks.engine [--json]`.

The model has the demo's shape (Qwen3 architecture, hidden 128, 2 layers, 90 words, fp32) and random weights.
Such a model gives every word about the same probability, so 9 of the 90 words as stop ids end a thought with
probability 0.1 a token: lengths are geometric, cut at 24, with a mean of 9 to 10, as those of the trained
demo model. Contexts have 10 to 25 tokens. A single thought has no stop ids and always runs to the limit,
because otherwise its random length would decide its time.

`generate` is used in its fastest form: one left-padded batch, `num_return_sequences`, temperature 1 without
top-k and top-p, the stop ids as its end-of-text ids, no scores returned. The engine does return
log-probabilities. Both alternate in one process on one thread, with other draws every time; the medians of
the repeats are compared.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import Qwen3Config, Qwen3ForCausalLM

from rollout import HFEngine, Prompt, SamplingParams

VOCABULARY, LIMIT = 90, 24
STOP_IDS = tuple(range(2, 11))
SHAPES = ((16, 8, 2.0), (16, 1, 1.0), (1, 1, 1.0))  # contexts, thoughts of each, the goal for the ratio
WARM_UP = 3


def demo_model() -> Qwen3ForCausalLM:
    """The demo's architecture with random weights, in eval mode."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        intermediate_size=256,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return Qwen3ForCausalLM(config).eval()


def generate(model: Qwen3ForCausalLM, prompts: list[Prompt], n: int) -> list[int]:
    """Sample n continuations of each prompt with `model.generate`; their lengths."""
    width = max(len(prompt.token_ids) for prompt in prompts)
    padding = [width - len(prompt.token_ids) for prompt in prompts]
    ids = torch.tensor([[0] * k + list(prompt.token_ids) for k, prompt in zip(padding, prompts, strict=True)])
    mask = torch.tensor([[0] * k + [1] * (width - k) for k in padding])
    stops = prompts[0].stop_ids
    output: Any = model.generate(
        ids,
        attention_mask=mask,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        num_return_sequences=n,
        max_new_tokens=LIMIT,
        eos_token_id=list(stops) or None,
        pad_token_id=0,
    )
    rows = output[:, width:].tolist()
    return [next((t + 1 for t, token in enumerate(row) if token in stops), len(row)) for row in rows]


def sample(engine: HFEngine, prompts: list[Prompt], n: int, seed: int) -> list[int]:
    """Sample n thoughts for each prompt with the engine; their lengths."""
    seeds = [seed * len(prompts) + i for i in range(len(prompts))]
    groups = asyncio.run(engine.sample(prompts, SamplingParams(max_thought_tokens=LIMIT), n, seeds))
    return [len(thought.token_ids) for group in groups for thought in group]


def timed(call: Callable[[], list[int]]) -> tuple[float, list[int]]:
    """Processor seconds of a call, and its result.

    On one thread this is the wall time without what other processes take.
    """
    start = time.process_time()
    lengths = call()
    return time.process_time() - start, lengths


def compare(model: Qwen3ForCausalLM, contexts: int, n: int, repeats: int) -> dict[str, float]:
    """Medians of both in milliseconds on the same contexts, mean lengths, and the ratio.

    A ratio above 1 means that the engine is faster.
    """
    rng = random.Random(contexts)
    ids = [tuple(rng.randrange(11, VOCABULARY) for _ in range(rng.randint(10, 25))) for _ in range(contexts)]
    prompts = [Prompt(context, stop_ids=STOP_IDS if contexts * n > 1 else ()) for context in ids]
    engine = HFEngine(model)
    runs: dict[str, Callable[[int], list[int]]] = {
        "engine": lambda seed: sample(engine, prompts, n, seed),
        "generate": lambda seed: generate(model, prompts, n),
    }
    torch.manual_seed(0)
    times: dict[str, list[float]] = {name: [] for name in runs}
    lengths: dict[str, list[int]] = {name: [] for name in runs}
    for repeat in range(WARM_UP + repeats):
        for name, run in runs.items():
            seconds, thought_lengths = timed(lambda run=run, seed=repeat: run(seed))
            if repeat >= WARM_UP:
                times[name].append(seconds)
                lengths[name] += thought_lengths
    medians = {name: statistics.median(values) * 1000 for name, values in times.items()}
    return {
        **{f"{name}_ms": medians[name] for name in runs},
        **{f"{name}_length": statistics.mean(lengths[name]) for name in runs},
        "ratio": medians["generate"] / medians["engine"],
    }


def main() -> None:
    """Run the comparison and print it: a table, or with --json one JSON object."""
    parser = argparse.ArgumentParser(description="The engine against batched model.generate.")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--repeats", type=int, default=31)
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    model = demo_model()
    results = {f"{c}x{n}": compare(model, c, n, options.repeats) | {"asked": asked} for c, n, asked in SHAPES}
    if options.json:
        facts = {"benchmark": "engine", "threads": 1, "repeats": options.repeats, "torch": torch.__version__}
        print(json.dumps({**facts, "transformers": transformers.__version__, "results": results}))
        return
    print(
        f"{'contexts x thoughts':>19} {'generate ms':>12} {'engine ms':>10} {'ratio':>7} {'asked':>6}   mean "
        "lengths"
    )
    for name, r in results.items():
        print(
            f"{name:>19} {r['generate_ms']:12.1f} {r['engine_ms']:10.1f} {r['ratio']:6.2f}x "
            f"{r['asked']:5.1f}x   {r['generate_length']:.1f} / {r['engine_length']:.1f}"
        )


if __name__ == "__main__":
    main()
