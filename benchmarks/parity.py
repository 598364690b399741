"""Log-probs of vLLM's thoughts against transformers around weight syncs, and what a sync costs.

    python -m benchmarks.parity [--updates 20] [--json]

Families, tied and untied heads, LoRA merged and as an adapter beside vLLM's own weights, each with random
weights and random updates that change every log-prob. The result is the largest difference over all sampled
tokens: before any update, after each sync, and without the sync (to show that the test can fail). Needs vLLM.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from rlpretrain.config import LoraConfig
from rlpretrain.models.adapters import adapter_config, adapter_pieces, add_lora, pieces
from rollout.probe import Probe
from rollout.types import Prompt, SamplingParams
from rollout.vllm_local import VLLMEngine

SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
LARGER = SHAPE | {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3, tied": ("qwen3", SHAPE | {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3, untied": ("qwen3", SHAPE | {"head_dim": 32, "tie_word_embeddings": False}),
    "llama, tied": ("llama", SHAPE | {"tie_word_embeddings": True}),
    "llama, untied": ("llama", SHAPE | {"tie_word_embeddings": False}),
    "gpt2, tied": ("gpt2", {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 512}),
    "qwen3, hidden 512": ("qwen3", LARGER | {"head_dim": 64, "tie_word_embeddings": True}),
}
LORA = {
    "qwen3, LoRA merged": "merged",
    "qwen3, LoRA adapter": "adapter",
    "llama, LoRA merged": "merged",
    "llama, LoRA adapter": "adapter",
}
VOCABULARY = 1024


def measure(family: str, shape: dict[str, Any], updates: int, lora: str | None = None) -> dict[str, Any]:
    """One family: differences with and without syncs, and median times of sync, copy and probe."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, vocab_size=VOCABULARY, **shape)
    ).eval()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(Path(folder))
        if lora:
            add_lora(model, LoraConfig(r=8, sync=lora))
        alone = adapter_config(model) if lora == "adapter" else None
        engine = VLLMEngine(folder, max_model_len=512, max_num_seqs=32, kv_cache_gib=0.1, lora=alone)
    parts = adapter_pieces if lora == "adapter" else pieces
    moved = [p for p in model.parameters() if p.requires_grad]
    prompts = [Prompt(tuple(torch.randint(VOCABULARY, (k,)).tolist()), stop_ids=()) for k in (12, 3, 70, 130)]
    params, probe = (
        SamplingParams(max_thought_tokens=16),
        Probe(VOCABULARY, engine.block_size, engine.max_model_len),
    )

    def worst() -> float:
        groups = asyncio.run(engine.sample(prompts, params, 4, range(len(prompts))))
        return max(difference(model, p, t) for p, group in zip(prompts, groups, strict=True) for t in group)

    result: dict[str, Any] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "before": worst(),
        "after": 0.0,
    }
    stale, seconds = [], {"sync": [], "copy": [], "probe": []}
    for version in range(1, updates + 1):
        with torch.no_grad():
            for p in moved:
                p += (0.05 if lora else 0.02) * torch.randn_like(p)
        stale.append(worst())
        begin = time.perf_counter()
        kept = {part.name: part.make().clone() for part in parts(model)}
        seconds["copy"].append(time.perf_counter() - begin)
        begin = time.perf_counter()
        engine.sync(lambda: ((part.name, part.make()) for part in parts(model)), version)
        seconds["sync"].append(time.perf_counter() - begin)
        begin = time.perf_counter()
        thoughts = asyncio.run(probe.ask(engine))
        asyncio.run(
            probe.verify(
                engine, thoughts, [logps(model, probe.prompt, t).tolist() for t in thoughts], version
            )
        )
        seconds["probe"].append(time.perf_counter() - begin)
        result["after"] = max(result["after"], worst())
        del kept
    engine.close()
    times = {f"{k}_ms": 1e3 * statistics.median(v) for k, v in seconds.items()}
    return result | {"without_sync": statistics.median(stale)} | times


@torch.no_grad()
def logps(model: Any, prompt: Prompt, thought: Any) -> torch.Tensor:
    """The model's log-probs of a thought."""
    logits = model(input_ids=torch.tensor([prompt.token_ids + thought.token_ids])).logits[
        0, len(prompt.token_ids) - 1 : -1
    ]
    return logits.log_softmax(-1).gather(1, torch.tensor(thought.token_ids)[:, None])[:, 0]


def difference(model: Any, prompt: Prompt, thought: Any) -> float:
    return float((logps(model, prompt, thought) - torch.tensor(thought.behaviour_logps)).abs().max())


def main() -> None:
    """Run all families and print a table, or with --json one JSON object."""
    parser = argparse.ArgumentParser(description="vLLM against transformers.")
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = {name: measure(family, shape, options.updates) for name, (family, shape) in FAMILIES.items()}
    for name, how in LORA.items():
        results[name] = measure(*FAMILIES[f"{name.split(',')[0]}, tied"], options.updates, lora=how)
    if options.json:
        facts = {"benchmark": "parity", "updates": options.updates, "torch": torch.__version__}
        print(json.dumps(facts | {"results": results}))
        return
    print("| model | parameters | before | worst after | without sync | copy ms | sync ms | probe ms |")
    print("|---|---|---|---|---|---|---|---|")
    for name, r in results.items():
        times = " | ".join(f"{r[f'{k}_ms']:.1f}" for k in ("copy", "sync", "probe"))
        print(
            f"| {name} | {r['parameters']:,} | {r['before']:.1e} | {r['after']:.1e} | "
            f"{r['without_sync']:.2f} | {times} |"
        )


if __name__ == "__main__":
    main()
