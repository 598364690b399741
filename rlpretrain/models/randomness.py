"""Forwards without randomness: thoughts must be scored with the probabilities they were sampled with.

Dropout and similar randomness is active in training mode only. Gradient checkpointing and other trainers need
that mode.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers.modeling_layers import GradientCheckpointingLayer

from rlpretrain.compat import embedding_weight_of, forward_of, text_config_of
from rlpretrain.config import ConfigError

RATE = re.compile(r"drop|jitter|noise")
"""Matches the names of rates that make a forward random: dropout, layerdrop, attn_pdrop, ..."""


def checkpoint_layers(model: Any, offload: bool = False) -> None:
    """Recompute activations in the backward pass, with every layer in evaluation mode while it computes.

    With `offload` the inputs of layers, which remain, are kept in CPU memory (pinned, and copied beside the
    computation). ConfigError if the model's code does not let us.

    transformers recomputes only layers in training mode, where their dropout, layer dropping and router noise
    are active. So layers are marked as in training mode, and switch to evaluation mode for their own forward.
    """
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.eval()
    layers = [
        m for m in model.modules() if isinstance(m, GradientCheckpointingLayer) and m.gradient_checkpointing
    ]
    for module in layers:
        layer: Any = module
        layer.training = True
        checkpoint = layer._gradient_checkpointing_func
        if offload:
            checkpoint = partial(_offloaded, checkpoint)
        layer._gradient_checkpointing_func = partial(_evaluated, layer, checkpoint)
    if not layers and offload:
        raise ConfigError(
            f"model.activation_offloading: {type(model).__name__} has code of its own for "
            "gradient_checkpointing, whose inputs cannot be offloaded; set it to false"
        )
    if not layers:  # custom model code, which checks the mode of the whole model
        model.train()
        switch_off(model)


def _evaluated(
    layer: nn.Module, checkpoint: Callable[..., Any], forward: Callable[..., Any], *args: Any
) -> Any:
    """Checkpoint a layer's forward so that it runs in evaluation mode, the recomputation included."""

    def forward_in_evaluation_mode(*inputs: Any) -> Any:
        layer.training = False
        try:
            return forward(*inputs)
        finally:
            layer.training = True

    return checkpoint(forward_in_evaluation_mode, *args)


def _offloaded(checkpoint: Callable[..., Any], forward: Callable[..., Any], *args: Any) -> Any:
    """Checkpoint a forward, and keep its hidden states in CPU memory.

    Inside, the checkpoint keeps nothing, so only its inputs reach `save_on_cpu`. Those without gradient
    (masks) are the same in every layer and stay where they are.
    """
    states = {i: x for i, x in enumerate(args) if isinstance(x, torch.Tensor) and x.requires_grad}
    others = [None if i in states else x for i, x in enumerate(args)]

    def forward_of_states(*tensors: torch.Tensor) -> Any:
        inputs = list(others)
        for i, tensor in zip(states, tensors, strict=True):
            inputs[i] = tensor
        return forward(*inputs)

    with torch.autograd.graph.save_on_cpu(pin_memory=any(x.is_cuda for x in states.values())):
        return checkpoint(forward_of_states, *states.values())


def switch_off(model: nn.Module, ask: bool = True) -> list[str]:
    """Set the rates of dropout, layer dropping and router noise to 0; return the rates that were not 0.

    For models that another trainer puts into training mode. The rates are in dropout layers, and in plain
    attributes for `functional.dropout`, attention kernels and routers. The configuration keeps its values.
    A rate that changes the model in evaluation mode too keeps its value (PhiMoE's jitter is also its routing
    threshold). Detecting that takes two forwards; without `ask`, all router noise keeps its value instead.
    """
    switched_off: dict[str, float] = {}
    for module in model.modules():
        if isinstance(module, _DropoutNd) and module.p:
            switched_off[type(module).__name__] = module.p
            module.p = 0.0
        rates = {n: v for n, v in vars(module).items() if isinstance(v, float) and v and RATE.search(n)}
        for name, value in rates.items():
            if "drop" in name or (ask and _only_in_training(model, module, name)):
                switched_off[name] = value
                setattr(module, name, 0.0)
    return [f"{name} {value:g}" for name, value in sorted(switched_off.items())]


def _only_in_training(model: nn.Module, module: nn.Module, name: str) -> bool:
    """Return whether a rate changes nothing in evaluation mode."""
    value = getattr(module, name)
    with in_mode(model, training=False):
        before = _probe(model).logits
        setattr(module, name, 0.0)
        after = _probe(model).logits
        setattr(module, name, value)
    return torch.equal(before, after)


def check_deterministic(model: nn.Module) -> None:
    """Raise ConfigError if two forwards of a model, in its current mode, give different logits.

    The second forward is made only if the first drew random numbers.
    """
    first = _probe(model)
    if not first.is_random or torch.equal(first.logits, _probe(model, seed=1).logits):
        return
    rates = [f"{name} {value:g}" for name, value in _configured_rates(model).items()]
    raise ConfigError(
        f"{type(model).__name__} draws random numbers in its forward, and they cannot be switched off from "
        "outside: thoughts would be scored with other probabilities than they were sampled with. Set the "
        f"rates of randomness in its config.json to 0 ({', '.join(rates) or 'it has no such field'}), or "
        "train it in evaluation mode (rlpretrain's own trainer without gradient_checkpointing)"
    )


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Put every module into training or evaluation mode for the duration of the context."""
    modes = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@dataclass(frozen=True, slots=True)
class _Probe:
    """The result of a forward of a few tokens."""

    logits: torch.Tensor
    is_random: bool
    """Whether the forward drew random numbers."""


@torch.no_grad()
def _probe(model: nn.Module, seed: int = 0) -> _Probe:
    """Run a forward of a few tokens from a seed of its own; the global random state does not change."""
    device = next(model.parameters()).device
    rows = embedding_weight_of(model).shape[0]
    ids = torch.arange(1, 9, device=device)[None] % rows
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        before = _generator_states(device)
        output = forward_of(model)(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        after = _generator_states(device)
    unchanged = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    return _Probe(output.logits, is_random=not unchanged)


def _generator_states(device: torch.device) -> list[torch.Tensor]:
    """Return the states of the random generators that a forward on `device` may use."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":  # tested on CPUs: docs/gpu.md
        states.append(torch.cuda.get_rng_state(device))
    return states


def _configured_rates(model: nn.Module) -> dict[str, float]:
    """Return the rates in a model's configuration."""
    values = text_config_of(model).to_dict()
    return {name: value for name, value in values.items() if isinstance(value, float) and RATE.search(name)}
