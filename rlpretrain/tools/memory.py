"""How much memory a rank of a run needs: an estimate from the settings and the model's shape, each part with
its formula.

An upper bound on what tensors need; the allocator's slack, the CUDA context, collective buffers and what a
DeepSpeed file offloads are not in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from rlpretrain.config import ConfigError, EngineConfig, LoraConfig, PretrainConfig
from rlpretrain.models.adapters import add_lora
from rlpretrain.objectives import parse_section

GIB = 2**30
LIBRARIES = 0.5 * GIB
"""What a process holds once everything is imported: .44 GiB were measured."""


@dataclass(frozen=True, slots=True)
class Item:
    """One part of a rank's memory; `when` is always, training or sampling (which do not overlap)."""

    name: str
    bytes: float
    formula: str
    when: str = "always"


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the estimate depends on, beside the settings: the backend is torch or deepspeed, `stage` its
    ZeRO stage.
    """

    parameters: int
    trained: int
    """Parameters that the optimizer changes: those of the adapters under LoRA."""
    linear: int
    """Parameters of linear layers but the head: those that `model.quantization` rounds."""
    ranks: int
    backend: str
    stage: int
    device: str
    prompt: int
    """Longest prompt in tokens: template, context and open tag."""
    row: int
    """Longest row in tokens: prompt, thought, close tag and target."""
    micro: int
    """Most tokens of one micro-batch: `token_budget`, or all that a step has."""
    longest: int = 0
    """Tokens of the longest document."""


def count_parameters(
    shape: Any, trust_remote_code: bool = False, lora: LoraConfig | None = None
) -> tuple[int, int, int]:
    """Parameters of the model that transformers builds from a configuration, tied ones once; those that are
    trained, and those of linear layers.

    Nothing is allocated. `lora` puts its adapters beside the model: they are in both numbers.
    """
    try:
        with torch.device("meta"):
            built = AutoModelForCausalLM.from_config(shape, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise ConfigError(
            f"{type(shape).__name__} is no causal language model that transformers builds: {error}"
        ) from error
    head = built.get_output_embeddings()
    linear = sum(
        m.weight.numel() for m in built.modules() if isinstance(m, torch.nn.Linear) and m is not head
    )
    if lora:
        with torch.device("meta"):
            add_lora(built, lora)
    parameters = list(built.parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad), linear


def memory(config: PretrainConfig, shape: Any, sizes: Sizes) -> list[Item]:
    """The parts of one rank's memory, each with its formula: P parameters, b bytes each, W ranks, h hidden, V
    vocabulary.

    Under LoRA, T are those of the adapters, in P too. Engines on servers or Ray actors have memory of their
    own.

    `shape` is the model's Hugging Face configuration. Activations are what autograd keeps for a decoder with
    a gated MLP, norms on queries and keys, and fused attention; per token and layer b (4 ff + 4 q) + (2 b +
    4) 2 h + (b + 4)(q + kv) bytes, with the MLP's width ff and those of queries and keys, q and kv. Plainer
    layers need less.
    """
    p, t, w, stage = sizes.parameters, sizes.trained, sizes.ranks, sizes.stage
    what = "P" if t == p else "T"
    b = getattr(torch, config.model.dtype).itemsize
    over = [
        "" if stage < k else " / W" for k in range(4)
    ]  # what ZeRO stage k shards: 1 optimizer, 2 gradients, 3 weights
    share = [w if text else 1 for text in over]
    gradient = 4 if b == 2 and sizes.backend == "torch" else b
    weights = Item("weights", b * p / share[3], f"{b} P{over[3]}")
    if (bits := {"4bit": 4, "8bit": 8}.get(config.model.quantization)) and sizes.linear:
        size = bits / 8 + 4 / 64  # a float32 scale for each 64 of them
        rest = p - sizes.linear
        weights = Item(
            "weights", size * sizes.linear + b * rest, f"{size:g} of P in linear layers, {b} of the rest"
        )
    items = [
        weights,
        Item("gradients", gradient * t / share[2], f"{gradient} {what}{over[2]}"),
        Item("AdamW's two moments", 8 * t / share[1], f"8 {what}{over[1]}"),
    ]
    if b == 2 or stage:
        items.append(Item("fp32 master weights", 4 * t / share[1], f"4 {what}{over[1]}"))
    if sizes.device == "cpu":
        items.append(Item("Python and libraries", LIBRARIES, "torch, transformers, datasets: measured"))
    thinks = parse_section(config.objective)[0].has_positions
    items += engine_weights(config.engine, config.model.dtype, p, stage) if thinks else []
    if thinks and config.baseline.name == "ema":
        items.append(Item("baseline ema", 4 * p, "4 P, whole on every rank"))
    if thinks and (config.baseline.name == "frozen" or config.baseline.frozen_every or config.eval.data):
        if config.policy.lora:
            items.append(Item("initial model", 0, "none: the trained one with its adapters off"))
        else:
            why = "for baseline frozen, ig/frozen (baseline.frozen_every: 0 saves it) and evaluation"
            items.append(Item("initial model", b * p, f"{b} P, whole on every rank, {why}"))
    if thinks and config.baseline.name == "frozen" and sizes.device == "cpu":
        items.append(
            Item(
                "log-probs of frozen",
                4 * config.baseline.cache_tokens,
                "4 bytes for each of baseline.cache_tokens",
            )
        )

    text = shape.get_text_config()
    h, layers, vocabulary = text.hidden_size, text.num_hidden_layers, text.vocab_size
    heads = getattr(text, "num_attention_heads", None) or 0
    size = getattr(text, "head_dim", None) or (h // heads if heads else 0)
    q, kv = heads * size, (getattr(text, "num_key_value_heads", None) or heads) * size
    ff = getattr(text, "intermediate_size", None) or 4 * h
    layer = b * (4 * ff + 4 * q) + (2 * b + 4) * 2 * h + (b + 4) * (q + kv)
    if (
        config.policy.lora and config.policy.lora.use_dora
    ):  # what a linear layer gives, with and without its adapter
        layer += 2 * b * (2 * ff + 2 * h + q + 2 * kv)
    each, how = layers * layer, f"{layers} layers x {layer:,} bytes"
    if config.model.gradient_checkpointing:
        each, how = (
            layers * h * b + layer,
            f"({layers} layers x {b} h + {layer:,} bytes of the layer at work)",
        )
    items.append(Item("activations", sizes.micro * each, f"{sizes.micro:,} tokens x {how}", "training"))
    tiles = 2 * (1024 if sizes.device == "cpu" else 8192) * 2048 * 4
    items.append(
        Item("head and its loss", tiles + vocabulary * h * b, f"two fp32 tiles, gradient {b} V h", "training")
    )
    if thinks and config.engine.reserved_gib:
        when = "sampling" if config.engine.sleeps else "always"
        items.append(Item("keys and values", config.engine.reserved_gib * GIB, "engine.kv_cache_gib", when))
    elif thinks and config.engine.reads_policy:
        rows = min(config.engine.batch_size, config.positions_per_step // w * config.sampling.thoughts)
        tokens = int(1.5 * (sizes.prompt + config.sampling.max_thought_tokens))
        items.append(
            Item(
                "keys and values",
                rows * tokens * layers * 2 * kv * b,
                f"{rows} rows x {tokens:,} tokens (half as many again: room to grow) x "
                f"{layers * 2 * kv * b:,} bytes",
                "sampling",
            )
        )
        items.append(
            Item(
                "logits of sampling",
                2 * rows * vocabulary * 4,
                f"two fp32 copies of {rows} rows x V",
                "sampling",
            )
        )
    return items


def engine_weights(engine: EngineConfig, dtype: str, p: int, stage: int) -> list[Item]:
    """The engine's own copy of the weights, where it has one in the trainer's process."""
    why = engine.own_weights(sharded=stage == 3)
    if not why:
        return []
    b = getattr(torch, (not engine.reads_policy and engine.dtype) or dtype).itemsize
    return [Item("engine's own weights", b * p, f"{b} P: {why}", "sampling" if engine.sleeps else "always")]


def peak(items: list[Item]) -> float:
    """Bytes: what is always there, and the larger of training and sampling."""
    total = {
        when: sum(i.bytes for i in items if i.when == when) for when in ("always", "training", "sampling")
    }
    return total["always"] + max(total["training"], total["sampling"])
