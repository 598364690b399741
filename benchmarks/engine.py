"""The engine against batched `model.generate`: `python -m benchmarks.engine [--json]`.

The model has the demo's shape (Qwen3 architecture, hidden 128, 2 layers, 90 words, fp32) and random weights. Such a
model gives every word about the same probability, so that 9 of the 90 words as stop ids end a thought with probability
0.1 a token: lengths are geometric, cut at 24, mean about 9, where the trained demo model has a mean of 9 to 10. Some
thought nearly always reaches the limit, in both. Contexts have 10 to 25 tokens.

`generate` runs as fast as it can be asked to: left-padded batch, `num_return_sequences`, sampling at temperature 1
without top-k and top-p, the stop ids as its end-of-text ids, no scores returned. The engine returns log-probabilities
as well. Both alternate in one process on one thread; the medians of the repeats are compared.
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
SHAPES = ((16, 8, 2.0), (16, 1, 1.0), (1, 1, 1.0))  # contexts, thoughts of each, the ratio asked for


def demo_model() -> Qwen3ForCausalLM:
    """The demo's architecture with random weights, in eval mode."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        head_dim=32, intermediate_size=256, max_position_embeddings=256, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).eval()


def generate(model: Qwen3ForCausalLM, contexts: list[tuple[int, ...]], n: int) -> list[int]:
    """Sample n continuations of each context with `model.generate`; their lengths."""
    width = max(map(len, contexts))
    ids = torch.tensor([[0] * (width - len(context)) + list(context) for context in contexts])
    mask = torch.tensor([[0] * (width - len(context)) + [1] * len(context) for context in contexts])
    output: Any = model.generate(
        ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, num_return_sequences=n,
        max_new_tokens=LIMIT, eos_token_id=list(STOP_IDS), pad_token_id=0,
    )  # fmt: skip
    lengths = []
    for row in output[:, width:].tolist():
        end = next((t + 1 for t, token in enumerate(row) if token in STOP_IDS), len(row))
        lengths.append(end)
    return lengths


def seconds(call: Callable[[], Any]) -> float:
    """Processor time of one call: on one thread that is wall time, without what others on the machine add to it."""
    start = time.process_time()
    call()
    return time.process_time() - start


def compare(model: Qwen3ForCausalLM, contexts: int, n: int, repeats: int) -> dict[str, float]:
    """Time both on the same contexts, alternating: medians in milliseconds and ratios (above 1: the engine wins)."""
    rng = random.Random(contexts)
    ids = [tuple(rng.randrange(11, VOCABULARY) for _ in range(rng.randint(10, 25))) for _ in range(contexts)]
    prompts = [Prompt(context, stop_ids=STOP_IDS) for context in ids]
    engine, params = HFEngine(model), SamplingParams(max_thought_tokens=LIMIT)
    lengths: dict[str, list[int]] = {"engine": [], "generate": []}

    def run_engine(seed: int) -> None:
        groups = asyncio.run(engine.sample(prompts, params, n, [seed * contexts + i for i in range(contexts)]))
        lengths["engine"] += [len(thought.token_ids) for group in groups for thought in group]

    def run_generate() -> None:
        lengths["generate"] += generate(model, ids, n)

    torch.manual_seed(0)
    times: dict[str, list[float]] = {"engine": [], "generate": []}
    for repeat in range(repeats + 3):
        taken = {"engine": seconds(lambda seed=repeat: run_engine(seed)), "generate": seconds(run_generate)}
        if repeat >= 3:  # the first rounds warm up
            for name in times:
                times[name].append(taken[name])
    result = {f"{name}_ms": statistics.median(values) * 1000 for name, values in times.items()}
    result |= {f"{name}_length": statistics.mean(values) for name, values in lengths.items()}
    # At 1 x 1 the number of steps differs from draw to draw, and with it the time: there the totals are compared.
    per_token = {name: sum(times[name]) / sum(lengths[name][3 * contexts * n :]) for name in times}
    return result | {
        "ratio": result["generate_ms"] / result["engine_ms"],
        "ratio_per_token": per_token["generate"] / per_token["engine"],
    }


def main() -> None:
    """Run the comparison and print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="print one JSON object after the table")
    parser.add_argument("--repeats", type=int, default=31)
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    model = demo_model()
    results = {f"{c}x{n}": compare(model, c, n, options.repeats) | {"asked": asked} for c, n, asked in SHAPES}
    print("contexts x thoughts   generate ms   engine ms   ratio   per token   asked   mean length (generate / engine)")
    for name, r in results.items():
        print(
            f"{name:>19} {r['generate_ms']:13.1f} {r['engine_ms']:11.1f} {r['ratio']:6.2f}x {r['ratio_per_token']:10.2f}x "
            f"{r['asked']:6.1f}x   {r['generate_length']:.1f} / {r['engine_length']:.1f}"
        )
    if options.json:
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        print(
            json.dumps(
                {"benchmark": "engine", "threads": 1, "repeats": options.repeats, **versions, "results": results}
            )
        )


if __name__ == "__main__":
    main()
