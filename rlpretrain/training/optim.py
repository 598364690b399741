"""The optimizer, by its name, and which parameters have weight decay.

The learning rate of every group is set before every step (`training.schedules`); weight decay is in the
groups.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from rlpretrain.compat import require_library
from rlpretrain.config import ConfigError, OptimConfig
from rlpretrain.config.names import hint
from rlpretrain.config.plugins import find
from rlpretrain.training.muon import MuonAndAdamW

Group = dict[str, Any]
Factory = Callable[[Sequence[Group], OptimConfig], torch.optim.Optimizer]

NOT_HERE = ("Optimizer", "LBFGS", "SparseAdam", "Muon")
"""Classes of torch.optim that a run cannot use: LBFGS needs a closure, SparseAdam sparse gradients."""
TORCH: dict[str, type[torch.optim.Optimizer]] = {
    name.lower(): kind
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and name not in NOT_HERE
}
"""The classes of torch.optim, by their names in lower case."""
EIGHT_BIT = {
    "adamw_8bit": "AdamW8bit",
    "adam_8bit": "Adam8bit",
    "lion_8bit": "Lion8bit",
    "sgd_8bit": "SGD8bit",
}
"""Optimizers of bitsandbytes with blockwise 8-bit state (arXiv 2110.02861)."""
BY_MATRIX = ("muon", "adafactor")
"""Optimizers whose update of a weight depends on the rest of its matrix."""
OWNED = ("params", "lr", "betas", "weight_decay")
"""Arguments that `optim.options` may not have, since fields of `optim` set them."""


def make_optimizer(groups: Sequence[Group], config: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer of `optim.name` for these parameter groups."""
    return find_optimizer(config)(groups, config)


def find_optimizer(config: OptimConfig) -> Factory:
    """The function that makes the optimizer of `optim.name`; ConfigError for a name that there is not."""
    name = config.name
    if name == "muon":
        return _make_muon
    if name in TORCH or name in EIGHT_BIT:
        return _make_by_class
    return find(name, "optim.name", ["muon", *TORCH, *EIGHT_BIT])


def check_optimizer(config: OptimConfig, flat: bool = False, split: bool = False) -> None:
    """Make the optimizer for a small model, so that its settings are checked early; ConfigError if it fails.

    `flat`: it will get the weights as flat pieces, as under ZeRO 1 to 3; `split`: as DTensors, as under FSDP.
    """
    if split and config.name in EIGHT_BIT:
        raise ConfigError(
            f"optim.name {config.name}: bitsandbytes does not know the DTensors of FSDP: use adamw, or "
            "policy.backend deepspeed"
        )
    if find_optimizer(config) not in (_make_muon, _make_by_class):
        if config.options:
            raise ConfigError("optim.options is for optimizers of torch and bitsandbytes, not for a factory")
        return
    if flat and config.name in BY_MATRIX:
        raise ConfigError(
            f"optim.name {config.name} needs whole matrices, and DeepSpeed flattens them from ZeRO 1 on: use "
            "policy.zero_stage 0, or policy.backend torch"
        )
    matrix = {"params": [nn.Parameter(torch.zeros(2, 2))], "weight_decay": config.weight_decay}
    make_optimizer([matrix | {"algorithm": "muon"}] if config.name == "muon" else [matrix], config)


def parameter_groups(model: nn.Module, weight_decay: float, *, tables_apart: bool = False) -> list[Group]:
    """Weight decay on matrices, none on vectors (norms, biases).

    With `tables_apart` the embedding and the head have a group of their own, and `algorithm` of each group
    is muon or adamw.
    """
    bodies, tables, vectors = [], [], []
    causal: Any = model
    owners = (
        filter(None, (causal.get_input_embeddings(), causal.get_output_embeddings())) if tables_apart else ()
    )
    in_tables = {id(parameter) for owner in owners for parameter in owner.parameters()}
    for parameter in model.parameters():
        if parameter.requires_grad:
            shape = getattr(parameter, "ds_shape", parameter.shape)  # the full shape under ZeRO 3
            is_body = id(parameter) not in in_tables and (not tables_apart or len(shape) == 2)
            (vectors if len(shape) < 2 else bodies if is_body else tables).append(parameter)
    groups: list[Group] = [
        {"params": bodies, "weight_decay": weight_decay},
        {"params": tables, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    if tables_apart:
        for group, algorithm in zip(groups, ("muon", "adamw", "adamw"), strict=True):
            group["algorithm"] = algorithm
    return [group for group in groups if group["params"]]


def groups_for(model: nn.Module, config: OptimConfig) -> list[Group]:
    """The parameter groups that the optimizer of `optim.name` needs."""
    return parameter_groups(model, config.weight_decay, tables_apart=config.name == "muon")


def _make_by_class(groups: Sequence[Group], config: OptimConfig) -> torch.optim.Optimizer:
    """A class of torch or bitsandbytes.

    AdamW is torch's fused one, on CPUs too, where a DeepSpeed JSON may offload its state.
    """
    kind: Any = TORCH.get(config.name)
    if kind is None:
        require_library("bitsandbytes", "qlora", f"optim.name {config.name} needs bitsandbytes")
        import bitsandbytes

        kind = getattr(bitsandbytes.optim, EIGHT_BIT[config.name])
    known = inspect.signature(kind).parameters
    _check_options(config, list(known))
    arguments: dict[str, Any] = {"fused": True} if config.name == "adamw" else {}
    if "betas" in known:
        arguments["betas"] = config.betas
    elif config.betas != OptimConfig().betas:
        raise ConfigError(f"optim.betas: {config.name} has none; optim.options has its own arguments")
    if "weight_decay" not in known and config.weight_decay:
        raise ConfigError(f"optim.weight_decay: {config.name} has none")
    return _construct(kind, groups, config, arguments)


def _make_muon(groups: Sequence[Group], config: OptimConfig) -> torch.optim.Optimizer:
    """Muon for the matrices of the body, AdamW for the rest.

    Updates have the size of AdamW's (arXiv 2502.16982), so that both use one learning rate.
    """
    _check_options(config, list(inspect.signature(torch.optim.Muon).parameters))
    arguments = {"adjust_lr_fn": "match_rms_adamw", "betas": config.betas}
    return _construct(MuonAndAdamW, groups, config, arguments)


def _check_options(config: OptimConfig, known: Sequence[str]) -> None:
    """Raise ConfigError for arguments that the class does not have, or that are fields of `optim`."""
    for name in config.options:
        if name in OWNED:
            raise ConfigError(f"optim.options.{name}: set optim.{name} instead")
        if name not in known:
            own = [argument for argument in known if argument not in OWNED]
            raise ConfigError(f"optim.options.{name}: {config.name} has no such argument; {hint(name, own)}")


def _construct(kind: Any, groups: Sequence[Group], config: OptimConfig, arguments: dict[str, Any]) -> Any:
    try:
        return kind(groups, lr=config.lr, **(arguments | config.options))
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"optim: {config.name} cannot be made: {error}") from error
