"""Nothing in a forward may be random: thoughts are scored with the probabilities they were sampled with.

Dropout and its kin are on in training mode only, which gradient checkpointing and other people's trainers
need.
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

from rlpretrain.compat import forward_of
from rlpretrain.config import ConfigError

RATE = re.compile(r"drop|jitter|noise")
"""Names of what makes a forward random: dropout, layerdrop, attn_pdrop, router_jitter_noise, ..."""


def checkpoint_layers(model: Any) -> None:
    """Recompute activations in backward, with every layer in evaluation mode while it computes.

    transformers recomputes only layers that are in training mode, in which their dropout, layer dropping and
    router noise are on, whatever each of them calls these. So the mode is only shown to it: inside, a layer
    runs as in sampling.
    """
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.eval()
    layers = [
        m for m in model.modules() if isinstance(m, GradientCheckpointingLayer) and m.gradient_checkpointing
    ]
    for layer in layers:
        layer.training = True
        layer._gradient_checkpointing_func = partial(_evaluated, layer, layer._gradient_checkpointing_func)
    if not layers:  # other people's code, which asks for the mode of the whole model
        model.train()
        switch_off(model)


def _evaluated(
    layer: nn.Module, recomputed: Callable[..., Any], forward: Callable[..., Any], *args: Any
) -> Any:
    """A layer's forward, to be recomputed, in evaluation mode each time."""

    def inside(*given: Any) -> Any:
        layer.training = False
        try:
            return forward(*given)
        finally:
            layer.training = True

    return recomputed(inside, *args)


def switch_off(model: nn.Module, ask: bool = True) -> list[str]:
    """Set the rates of dropout, layer dropping and router noise in a model to 0; returns those that were not.

    For models that somebody else puts into training mode. The rates are in dropout layers and in plain
    attributes for `functional.dropout`, attention kernels and routers; the configuration keeps its values.
    What changes the model in evaluation mode too (PhiMoE's routing threshold is its jitter) keeps its value;
    without `ask`, which compares two forwards, all router noise does.
    """
    found: dict[str, float] = {}
    for module in model.modules():
        if isinstance(module, _DropoutNd) and module.p:
            found[type(module).__name__] = module.p
            module.p = 0.0
        rates = {n: v for n, v in vars(module).items() if isinstance(v, float) and v and RATE.search(n)}
        for name, value in rates.items():
            if "drop" in name or (ask and _only_in_training(model, module, name)):
                found[name] = value
                setattr(module, name, 0.0)
    return [f"{name} {value:g}" for name, value in sorted(found.items())]


def _only_in_training(model: nn.Module, module: nn.Module, name: str) -> bool:
    """Whether a rate changes nothing in evaluation mode."""
    value = getattr(module, name)
    with in_mode(model, training=False):
        before = _logits(model).logits
        setattr(module, name, 0.0)
        after = _logits(model).logits
        setattr(module, name, value)
    return torch.equal(before, after)


def check_deterministic(model: nn.Module) -> None:
    """Raise ConfigError if two forwards of a model, in the mode it is in, give different logits.

    The second is made only where the first has drawn random numbers.
    """
    first = _logits(model)
    if not first.drew or torch.equal(first.logits, _logits(model, seed=1).logits):
        return
    rates = [f"{name} {value:g}" for name, value in _rates(model).items()]
    raise ConfigError(
        f"{type(model).__name__} draws random numbers in its forward that cannot be switched off from "
        "outside: thoughts would be scored with other probabilities than they were sampled with. Set what is "
        f"random to 0 in its config.json (it has {', '.join(rates) or 'no field that says so'}), or train it "
        "in evaluation mode (rlpretrain's own trainer without gradient_checkpointing)"
    )


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """While it lasts, every module is in training or evaluation mode; outside, in the mode it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@dataclass(frozen=True, slots=True)
class _Forward:
    logits: torch.Tensor
    drew: bool
    """Whether it has drawn random numbers."""


@torch.no_grad()
def _logits(model: nn.Module, seed: int = 0) -> _Forward:
    """A forward of a few tokens; the random state outside stays as it was."""
    device = next(model.parameters()).device
    rows = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    ids = torch.arange(1, 9, device=device)[None] % rows
    ask: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        before = _states(device)
        logits = forward_of(model)(**ask).logits
        drew = not all(torch.equal(a, b) for a, b in zip(before, _states(device), strict=True))
    return _Forward(logits, drew)


def _states(device: torch.device) -> list[torch.Tensor]:
    """The states of the generators that a forward on `device` may draw from."""
    here = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *here]


def _rates(model: nn.Module) -> dict[str, float]:
    """The rates in a model's configuration."""
    values = model.config.get_text_config().to_dict()  # type: ignore[union-attr, operator]
    return {name: value for name, value in values.items() if isinstance(value, float) and RATE.search(name)}
