"""Weights of the policy under the names of its checkpoint, with LoRA adapters merged in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rlpretrain.compat import text_config_of
from rlpretrain.config import ConfigError

_WRAPPERS = (".base_layer.", ".token_adapter.")


@dataclass(frozen=True)
class Piece:
    """One tensor of the policy to pass on."""

    name: str
    needs: tuple[nn.Parameter, ...]
    """The parameters from which it is computed; ZeRO-3 gathers them first."""
    make: Callable[[], Tensor]
    """Computes it."""


def is_adapter(name: str) -> bool:
    """Return whether a parameter belongs to an adapter."""
    return ".lora_" in name or ".trainable_tokens_" in name


def pieces(model: nn.Module) -> Iterator[Piece]:
    """Yield every parameter under its name in the checkpoint, with adapters merged in and dequantised.

    A tied parameter comes under each of its names. Raises ConfigError for adapters that a checkpoint of the
    model cannot store.
    """
    _check_mergeable(model)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        checkpoint_name = plain_name(model, name)
        if checkpoint_name is None:
            continue
        owner, _, leaf = name.rpartition(".")
        wrappers: list[Any] = []  # PEFT's layers around the owner, the innermost first
        while owner.endswith(".base_layer"):
            owner = owner.removesuffix(".base_layer")
            wrappers.append(model.get_submodule(owner))
        # PEFT wraps fused experts once for each parameter.
        of_parameter = [layer for layer in wrappers if getattr(layer, "parameter_name", None) == leaf]
        if of_parameter:
            needs = tuple(wrappers[-1].parameters())
            yield Piece(checkpoint_name, needs, partial(_merge_parameter, parameter, of_parameter))
        elif wrappers and leaf == "weight":
            (layer,) = wrappers
            yield Piece(checkpoint_name, tuple(layer.parameters()), partial(_merge_layer, layer))
        elif parameter.is_floating_point():
            yield Piece(checkpoint_name, (parameter,), parameter.detach)
        else:
            dequantise = partial(_dequantise, model.get_submodule(owner))
            yield Piece(checkpoint_name, (parameter,), dequantise)


def plain_name(model: nn.Module, name: str) -> str | None:
    """Return a parameter's or buffer's name in the checkpoint.

    None if the checkpoint does not have it: adapters, and modules that are not in use.
    """
    if is_adapter(name) or ".original_module." in name:
        return None
    for wrapper in _WRAPPERS:
        while wrapper in name:
            name = name.replace(wrapper, ".")
    owner, saved_whole, rest = name.partition(".modules_to_save.")
    if not saved_whole:
        return name
    adapter, _, leaf = rest.partition(".")
    module: Any = model.get_submodule(owner)
    return f"{owner}.{leaf}" if adapter in module.active_adapters else None


def _check_mergeable(model: nn.Module) -> None:
    """Raise ConfigError for adapters that cannot be merged into weights of the checkpoint."""
    for name, layer in model.named_modules():
        if not hasattr(layer, "base_layer") or hasattr(layer, "get_merged_weights"):
            continue
        if not hasattr(layer, "lora_A"):
            raise ConfigError(
                f"{name} has an adapter that is not LoRA ({type(layer).__name__}): it cannot be merged"
            )
        if any(getattr(layer, "lora_bias", {}).values()):
            raise ConfigError(f"{name}: lora_bias cannot be merged into the weights: set lora_bias=False")
    causal: Any = model
    tables = (causal.get_input_embeddings(), causal.get_output_embeddings())
    saved_whole = [hasattr(table, "modules_to_save") for table in tables]
    if text_config_of(model).tie_word_embeddings and any(saved_whole) and not all(saved_whole):
        raise ConfigError(
            "modules_to_save names only one of the embedding and the head, which the checkpoint ties: the "
            "merged weights can hold only one of the two. Leave it out, or train rows of both with "
            "trainable_token_indices"
        )


@torch.no_grad()
def _merge_parameter(parameter: nn.Parameter, layers: Sequence[Any]) -> Tensor:
    """Return one parameter of a module with the active adapters of PEFT's layers around it."""
    weight = parameter.detach()
    for layer in layers:
        for name in layer.active_adapters:
            if name in layer.lora_A:
                weight = weight + layer.get_delta_weight(name).detach().to(weight.dtype)
    return weight


@torch.no_grad()
def _merge_layer(layer: Any) -> Tensor:
    """Return the weight of a wrapped layer with its active adapters."""
    if hasattr(layer, "get_merged_weights"):  # trained rows of a table
        return layer.get_merged_weights(layer.active_adapters).detach()
    weight = _dequantise(layer.base_layer)
    for name in layer.active_adapters:
        if (variant := layer.lora_variant.get(name)) is not None:  # DoRA
            weight = variant.merge_safe(layer, name, weight).detach()
        elif name in layer.lora_A or name in layer.lora_embedding_A:
            weight = weight + layer.get_delta_weight(name).detach().to(weight.dtype)
    return weight


def _dequantise(layer: Any) -> Tensor:
    """Return the weight of a layer in full precision."""
    if layer.weight.dtype == torch.int8:  # on a CPU, PEFT's own function removes the layer's scales
        scales = layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB
        return layer.weight.detach() * scales[:, None] / 127
    from peft.utils.integrations import dequantize_module_weight

    return dequantize_module_weight(layer).detach()
