"""How much memory a rank of a run needs: an estimate from the settings and the model's shape, each part with its formula.

An upper bound on what tensors need; the allocator's slack, the CUDA context, collective buffers and what a DeepSpeed file
offloads are not in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from rlpretrain.config import PretrainConfig
from rlpretrain.objectives import parse_section


@dataclass(frozen=True, slots=True)
class Item:
    """One part of a rank's memory; `when` is always, training or sampling (which do not overlap)."""

    name: str
    bytes: float
    formula: str
    when: str = "always"


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the estimate depends on, beside the settings: the backend is torch or deepspeed, `stage` its ZeRO stage."""

    parameters: int
    ranks: int
    backend: str
    stage: int
    device: str
    prompt: int
    """Longest prompt in tokens: template, context and open tag."""
    row: int
    """Longest row in tokens: prompt, thought, close tag and target."""
    micro: int
    """Most tokens of one micro-batch."""


def memory(config: PretrainConfig, shape: Any, plan: Plan) -> list[Item]:
    """The parts of one rank's memory in bytes, each with its formula: P parameters, b bytes each, W ranks.

    Activations are those that autograd keeps for a decoder with a gated MLP and norms on queries and keys, attention by a
    fused kernel: per token and layer b(4 ff + 4 q) + (2b + 4) 2h + (b + 4)(q + kv), where h is the hidden size, ff the
    MLP's, q and kv the widths of queries and of keys.
    """
    p, w, stage = plan.parameters, plan.ranks, plan.stage
    b = getattr(torch, config.model.dtype).itemsize
    half, has_positions = b == 2, parse_section(config.objective)[0].has_positions
    cut = {k: w if stage >= k else 1 for k in (1, 2, 3)}
    gradient = 4 if half and plan.backend == "torch" else b
    master = 4 if half or stage else 0
    items = [
        Item("weights", b * p / cut[3], "b P" + " / W" * (stage >= 3)),
        Item("gradients", gradient * p / cut[2], f"{gradient} P" + " / W" * (stage >= 2)),
        Item("optimizer (AdamW)", 8 * p / cut[1], "8 P" + " / W" * (stage >= 1)),
        Item("fp32 master weights", master * p / cut[1], f"{master} P" + " / W" * (stage >= 1 and master > 0)),
    ]
    if has_positions and stage == 3:
        items.append(Item("engine's own weights", b * p, "b P: ZeRO 3 shards the policy's"))
    if has_positions and config.baseline.name in ("ema", "frozen"):
        size = 4 if config.baseline.name == "ema" else b
        items.append(Item(f"baseline ({config.baseline.name})", size * p, f"{size} P, whole on every rank"))
    if has_positions and (config.baseline.frozen_every or config.eval.data):
        items.append(Item("frozen initial model", b * p, "b P, for ig/frozen and evaluation; baseline.frozen_every: 0 saves it"))

    text = shape.get_text_config()
    h, layers, vocabulary = text.hidden_size, text.num_hidden_layers, text.vocab_size
    heads = getattr(text, "num_attention_heads", None) or 0
    size = getattr(text, "head_dim", None) or (h // heads if heads else 0)
    kv = (getattr(text, "num_key_value_heads", None) or heads) * size
    q, ff, n = heads * size, getattr(text, "intermediate_size", None) or 4 * h, plan.micro
    layer = b * (4 * ff + 4 * q) + (2 * b + 4) * 2 * h + (b + 4) * (q + kv)
    if config.model.gradient_checkpointing:
        items.append(Item("activations", n * (layers * h * b + layer),
                          f"{n:,} tokens x ({layers} layers x b h + one layer's {layer:,} bytes)", "training"))  # fmt: skip
    else:
        items.append(Item("activations", n * layers * layer, f"{n:,} tokens x {layers} layers x {layer:,} bytes", "training"))
    tile = 2 * (1024 if plan.device == "cpu" else 8192) * 2048 * 4
    items.append(Item("logits of the loss", tile + vocabulary * h * b, "two fp32 tiles, and the head's own gradient b V h", "training"))
    if has_positions:
        rows = min(config.engine.batch_size, config.positions_per_step // w * config.sampling.thoughts)
        tokens = int(1.5 * (plan.prompt + config.sampling.max_thought_tokens))
        items.append(Item("keys and values", rows * tokens * layers * 2 * kv * b,
                          f"{rows} rows x {tokens:,} tokens (1.5 x the longest: room to grow) x {layers} x 2 kv b", "sampling"))  # fmt: skip
        items.append(Item("logits of sampling", 2 * rows * vocabulary * 4, f"two fp32 copies of {rows} rows x V", "sampling"))
    return items


def peak(items: list[Item]) -> float:
    """What is always there, and the larger of training and sampling, in bytes."""
    total = {when: sum(i.bytes for i in items if i.when == when) for when in ("always", "training", "sampling")}
    return total["always"] + max(total["training"], total["sampling"])
