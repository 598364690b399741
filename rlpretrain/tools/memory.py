"""The memory that a rank of a run needs, estimated part by part from the settings and the model's shape.

It is an upper bound on what tensors need. The allocator's slack, the CUDA context, collective buffers and
what a DeepSpeed file offloads are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from rewards.logit_tiles import tile_shape
from rlpretrain.config import EngineConfig, PretrainConfig
from rlpretrain.models.spending import widths_of
from rlpretrain.objectives import parse_section
from rlpretrain.tools.parameter_counts import count_tables

GIB = 2**30
LIBRARIES = 0.62 * GIB
"""What a process holds once everything is imported and a tokenizer is loaded: .62 GiB were measured."""

VLLM = 0.5 * GIB
"""What vLLM in the same process adds on a CPU: `benchmarks.real_matrix` measured .2 to .6 GiB."""


@dataclass(frozen=True, slots=True)
class Item:
    """One part of a rank's memory; `when` is always, training or sampling (which do not overlap)."""

    name: str
    bytes: float
    formula: str
    when: str = "always"


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the estimate depends on beside the settings. `stage` is that of ZeRO, and 3 under FSDP."""

    parameters: int
    trained: int
    """Parameters that the optimizer changes: those of the adapters under LoRA."""
    linear: int
    """Parameters of linear layers without the head: those that `model.quantization` rounds."""
    ranks: int
    backend: str
    stage: int
    device: str
    prompt: int
    """Longest prompt in tokens: template, context and open tag."""
    row: int
    """Longest row in tokens: prompt, thought, close tag and target."""
    micro: int
    """The most tokens of one micro-batch: `token_budget`, or all tokens of a step."""
    longest: int = 0
    """Tokens of the longest document."""
    reference: int = 0
    """Parameters of the model of `reference.path`; 0 without one."""
    own: int = 0
    """Parameters that the objective trains beside the model."""
    needs: frozenset[str] = frozenset()
    """What the objective needs with its settings; its class may need less."""


def memory(config: PretrainConfig, shape: Any, sizes: Sizes) -> list[Item]:
    """The parts of one rank's memory, each with its formula; `shape` is the Hugging Face configuration.

    P parameters, T trained ones (adapters, which are in P too), b bytes of one, W ranks, h hidden, V
    vocabulary. Engines on servers or Ray actors have memory of their own.
    """
    owner, _ = parse_section(config.objective)
    thinks = owner.has_positions
    items = _trained_state(config, sizes)
    if sizes.device == "cpu":
        items.append(Item("Python and libraries", LIBRARIES, "torch, transformers, datasets: measured"))
    if thinks:
        items += engine_weights(config.engine, config.model.dtype, sizes.parameters, sizes.stage)
        items += _engine_extras(config, sizes)
    needs = owner.needs | sizes.needs
    if thinks or {"reference", "teacher"} & needs:
        items += _reference_models(config, sizes, needs, thinks)
    if sizes.backend == "fsdp":
        items.append(_gathered_weights(config, shape, sizes))
    if "learner" in needs:
        items += _learner_state(sizes)
    items += _training_tensors(config, shape, sizes)
    if thinks:
        items += _sampling_tensors(config, shape, sizes)
    return items


def _trained_state(config: PretrainConfig, sizes: Sizes) -> list[Item]:
    """Weights, gradients and optimizer state."""
    p, t, stage = sizes.parameters, sizes.trained, sizes.stage
    name = "P" if t == p else "T"
    b = getattr(torch, config.model.dtype).itemsize
    # What ZeRO stage k shards: 1 optimizer, 2 gradients, 3 weights.
    holders, letter = sizes.ranks, "W"
    if config.policy.fsdp.replicas > 1:
        holders, letter = sizes.ranks // config.policy.fsdp.replicas, "W per replica"
    over = ["" if stage < k else f" / {letter}" for k in range(4)]
    share = [holders if text else 1 for text in over]
    weights = Item("weights", b * p / share[3], f"{b} P{over[3]}")
    bits = {"4bit": 4, "8bit": 8}.get(config.model.quantization)
    if bits and sizes.linear:
        size = bits / 8 + 4 / 64  # a float32 scale for each 64 weights
        rest = p - sizes.linear
        formula = f"{size:g} of P in linear layers, {b} of the rest"
        weights = Item("weights", size * sizes.linear + b * rest, formula)
    items = [
        weights,
        Item("gradients", 4 * t / share[2], f"4 {name}{over[2]}"),  # they add up in float32
        _optimizer_state(config.optim.name, t / share[1], f"{name}{over[1]}"),
    ]
    if sizes.backend == "fsdp":  # trained weights are there in float32 only
        frozen = f"4 {name}" if t == p else f"4 T + {b} (P - T)"
        items[0] = Item("weights", (4 * t + b * (p - t)) / holders, f"({frozen}){over[3]}")
    elif b == 2 or stage:
        items.append(Item("fp32 master weights", 4 * t / share[1], f"4 {name}{over[1]}"))
    average = config.average
    if average and average.device == "policy" and average.kind != "last_k":
        items.append(Item("average of the weights", 4 * t / sizes.ranks, f"4 {name} / W"))
    return items


def _gathered_weights(config: PretrainConfig, shape: Any, sizes: Sizes) -> Item:
    """The whole weights that FSDP holds at a time: what is outside the layers, and two layers or all."""
    text = shape.get_text_config()
    b = getattr(torch, config.model.dtype).itemsize
    tables = count_tables(shape)
    layers = sizes.parameters - tables
    if config.policy.fsdp.reshard:
        layers *= min(1, 2 / text.num_hidden_layers)
    formula = f"{b} x (embedding, head, {'two layers' if config.policy.fsdp.reshard else 'all layers'})"
    return Item("gathered weights", b * (tables + layers), formula, "training")


def _optimizer_state(optimizer: str, trained: float, formula: str) -> Item:
    """The optimizer's state; for those of unknown size as much as AdamW's."""
    if optimizer.endswith("_8bit"):
        return Item("8-bit optimizer state, at most", 2 * trained, f"2 {formula}")
    label = "AdamW's two moments" if optimizer == "adamw" else "optimizer state, as if AdamW's"
    return Item(label, 8 * trained, f"8 {formula}")


def _reference_models(
    config: PretrainConfig, sizes: Sizes, needs: frozenset[str], thinks: bool
) -> list[Item]:
    """The models that gains are measured against, and the reference's, whole on every rank."""
    p, b, baseline = sizes.parameters, getattr(torch, config.model.dtype).itemsize, config.baseline
    items = []
    if sizes.reference:
        size = getattr(torch, config.reference.dtype or config.model.dtype).itemsize
        formula = f"{size} bytes for each of its {sizes.reference:,} parameters, whole on every rank"
        items.append(Item("reference model", size * sizes.reference, formula))
        if sizes.device == "cpu":
            formula = "4 bytes for each of reference.cache_tokens"
            items.append(Item("log-probs of the reference", 4 * config.reference.cache_tokens, formula))
    scores_or_teaches = bool({"reference", "teacher"} & needs)
    needs_initial = "initial" in needs or (scores_or_teaches and not sizes.reference)
    if baseline.name == "ema":
        items.append(Item("baseline ema", 4 * p, "4 P, whole on every rank"))
    measured = thinks and bool(baseline.frozen_every or config.eval.data)
    if needs_initial or baseline.name == "frozen" or measured:
        if config.policy.lora:
            items.append(Item("initial model", 0, "none: the trained one with its adapters off"))
        else:
            reason = "for baseline frozen, ig/frozen (baseline.frozen_every: 0 saves it) and evaluation"
            if needs_initial:
                reason = "which the objective needs"
            items.append(Item("initial model", b * p, f"{b} P, whole on every rank, {reason}"))
    if baseline.name == "frozen" and sizes.device == "cpu":
        formula = "4 bytes for each of baseline.cache_tokens"
        items.append(Item("log-probs of frozen", 4 * baseline.cache_tokens, formula))
    return items


def _learner_state(sizes: Sizes) -> list[Item]:
    """What an objective with need "learner" holds: a direction, a copy of the weights that it shifts."""
    name = "P" if sizes.trained == sizes.parameters else "T"
    formula = f"8 {name}: direction and kept weights, less with a smaller objective.subset"
    items = [Item("shift of the weights, at most", 8 * sizes.trained, formula, "training")]
    if sizes.own:
        formula = f"16 bytes for each of its {sizes.own:,} parameters, whole on every rank"
        items.append(Item("model of the objective, with AdamW", 16 * sizes.own, formula))
    return items


def _training_tensors(config: PretrainConfig, shape: Any, sizes: Sizes) -> list[Item]:
    """Activations, and what the head and its loss need.

    Activations are what autograd keeps for a decoder with a gated MLP, norms on queries and keys, and
    fused attention. Per token and layer these are b (4 ff + 4 q) + (2 b + 4) 2 h + (b + 4)(q + kv) bytes,
    with the MLP's width ff and those of queries and keys, q and kv. Simpler layers need less.
    """
    text, b = shape.get_text_config(), getattr(torch, config.model.dtype).itemsize
    w, layers = widths_of(text), text.num_hidden_layers
    layer = b * (4 * w.mlp + 4 * w.queries) + (2 * b + 4) * 2 * w.hidden + (b + 4) * (w.queries + w.keys)
    if config.policy.lora and config.policy.lora.use_dora:
        # outputs of linear layers with and without the adapter
        layer += 2 * b * (2 * w.mlp + 2 * w.hidden + w.queries + 2 * w.keys)
    per_token, formula = layers * layer, f"{layers} layers x {layer:,} bytes"
    if config.model.gradient_checkpointing:
        per_token = layers * w.hidden * b + layer
        formula = f"({layers} layers x {b} h + {layer:,} bytes of the layer at work)"
    if config.model.activation_offloading and sizes.device != "cpu":
        per_token = w.hidden * b + layer
        kept = sizes.micro * layers * w.hidden * b / GIB
        formula = f"({b} h + {layer:,} bytes of the layer at work); {kept:.2f} GiB are in CPU memory"
    rows, columns = tile_shape(sizes.device.partition(":")[0])
    rows, columns = min(rows, sizes.micro), min(columns, text.vocab_size)
    width = 4 if sizes.device == "cpu" else b
    head = 2 * rows * columns * width + text.vocab_size * w.hidden * b
    tiles = f"two tiles of {rows:,} x {columns:,} x {width}, gradient {b} V h"
    return [
        Item("activations", sizes.micro * per_token, f"{sizes.micro:,} tokens x {formula}", "training"),
        Item("head and its loss", head, tiles, "training"),
    ]


def _sampling_tensors(config: PretrainConfig, shape: Any, sizes: Sizes) -> list[Item]:
    """What the engine of this process holds beside its weights."""
    engine, text = config.engine, shape.get_text_config()
    if engine.reserved_gib:
        when = "sampling" if engine.sleeps else "always"
        return [Item("keys and values", engine.reserved_gib * GIB, "engine.kv_cache_gib", when)]
    if not engine.reads_policy:
        return []
    thoughts = config.positions_per_step // sizes.ranks * config.sampling.thoughts
    rows = min(engine.batch_size, thoughts)
    tokens = int(1.5 * (sizes.prompt + config.sampling.max_thought_tokens))
    b = getattr(torch, config.model.dtype).itemsize
    per_token = text.num_hidden_layers * 2 * widths_of(text).keys * b
    formula = f"{rows} rows x {tokens:,} tokens (half as many again: room to grow) x {per_token:,} bytes"
    logits = f"two fp32 copies of {rows} rows x V"
    return [
        Item("keys and values", rows * tokens * per_token, formula, "sampling"),
        Item("logits of sampling", 2 * rows * text.vocab_size * 4, logits, "sampling"),
    ]


def engine_weights(engine: EngineConfig, dtype: str, parameters: int, stage: int) -> list[Item]:
    """The engine's own copy of the weights, where it has one in the trainer's process."""
    reason = engine.own_weights(sharded=stage == 3)
    if not reason:
        return []
    b = getattr(torch, (not engine.reads_policy and engine.dtype) or dtype).itemsize
    when = "sampling" if engine.sleeps else "always"
    return [Item("engine's own weights", b * parameters, f"{b} P: {reason}", when)]


def _engine_extras(config: PretrainConfig, sizes: Sizes) -> list[Item]:
    """What vLLM in the trainer's process takes beside its weights and its keys and values."""
    engine, lora, items = config.engine, config.policy.lora, []
    if not engine.in_process or engine.reads_policy:
        return items
    if sizes.device == "cpu":
        items.append(Item("vLLM's code and buffers", VLLM, "measured with SmolLM2-135M"))
        b = getattr(torch, engine.dtype or config.model.dtype).itemsize
        formula = f"{b} P, at most: .37 GiB were measured for the .51 of SmolLM2-135M"
        items.append(Item("vLLM's memory of a sync", b * sizes.parameters, formula, "sampling"))
    if lora and lora.sync == "merged":
        b = getattr(torch, config.model.dtype).itemsize
        formula = f"{b} P, all at once (policy.lora.sync: adapter saves it)"
        items.append(Item("merged weights of a sync", b * sizes.parameters, formula, "sampling"))
    return items


def peak(items: list[Item]) -> float:
    """Bytes: what is always there, and the larger of training and sampling."""
    total: dict[str, float] = {"always": 0.0, "training": 0.0, "sampling": 0.0}
    for item in items:
        total[item.when] += item.bytes
    return total["always"] + max(total["training"], total["sampling"])
