"""LoRA on the policy: small trained matrices beside frozen weights (arXiv 2106.09685), by PEFT.

The model stays what transformers made; its linear layers are wrapped in place. Whoever asks for weights gets merged ones under
the names of the checkpoint, so engines, baselines and saved models know nothing of adapters; an engine that can run an adapter
beside its own base weights may get the adapter alone.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from rlpretrain.config import ConfigError, LoraConfig

INSTALL = 'pip install "rlpretrain[peft]"'
NAME = "default"
_BASE = ".base_layer."


@dataclass(frozen=True)
class Piece:
    """One tensor to hand over: its name, the parameters it is made of (gathered first under ZeRO 3), and how."""

    name: str
    needs: tuple[nn.Parameter, ...]
    make: Callable[[], Tensor]


def add_lora(model: nn.Module, config: LoraConfig) -> nn.Module:
    """Freeze `model` and put trained adapters beside its layers, in place; ConfigError for layers that are not there."""
    try:
        import peft
    except ImportError as error:
        raise ImportError(f"policy.lora needs PEFT: {INSTALL}") from error
    targets = config.target_modules if isinstance(config.target_modules, str) else list(config.target_modules)
    lora = peft.LoraConfig(r=config.r, lora_alpha=config.alpha, lora_dropout=0.0, target_modules=targets, task_type="CAUSAL_LM")
    try:
        return peft.inject_adapter_in_model(lora, model, adapter_name=NAME)  # type: ignore[arg-type]
    except ValueError as error:
        raise ConfigError(f"policy.lora.target_modules {config.target_modules}: {str(error).splitlines()[0]}") from None


def has_lora(model: nn.Module) -> bool:
    """Whether `add_lora` was here."""
    return NAME in getattr(model, "peft_config", {})


def pieces(model: nn.Module) -> Iterator[Piece]:
    """Every parameter under the names of the checkpoint, tied ones under each, with the adapters merged in."""
    for name, p in model.named_parameters(remove_duplicate=False):
        if ".lora_" in name:
            continue
        owner, inside, leaf = name.partition(_BASE)
        if inside and leaf == "weight":
            layer: Any = model.get_submodule(owner)
            a, b = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
            yield Piece(f"{owner}.{leaf}", (p, a, b),
                        lambda p=p, layer=layer: p.detach() + layer.get_delta_weight(NAME).detach().to(p.dtype))  # fmt: skip
        else:
            yield Piece(name.replace(_BASE, "."), (p,), p.detach)


def adapter_pieces(model: nn.Module) -> Iterator[Piece]:
    """The adapters alone, named as in PEFT's files."""
    for name, p in model.named_parameters():
        if ".lora_" in name:
            yield Piece(f"base_model.model.{name.replace(f'.{NAME}.', '.')}", (p,), p.detach)


def adapter_config(model: Any) -> dict[str, Any]:
    """What PEFT's adapter_config.json would hold."""
    plain = json.dumps(model.peft_config[NAME].to_dict(), default=lambda v: sorted(v) if isinstance(v, set) else str(v))
    return json.loads(plain)


def plain_copy(model: nn.Module) -> nn.Module:
    """A frozen copy without adapters: its weights are the base's until merged ones are copied into it."""
    twin: Any = copy.deepcopy(model).requires_grad_(False)
    for name, module in [(n, m) for n, m in twin.named_modules() if hasattr(m, "base_layer")]:
        parent, _, leaf = name.rpartition(".")
        setattr(twin.get_submodule(parent), leaf, module.base_layer)
    if has_lora(twin):
        del twin.peft_config
    return twin
