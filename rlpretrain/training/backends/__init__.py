"""Backends: the trained model with the methods of `Policy`. All give the same results.

The loss that `backward` takes is already divided by the step's global counts, so gradients are *summed* over
micro-batches and over ranks.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from rlpretrain import compat
from rlpretrain.config import ConfigError, FsdpConfig, OptimConfig, PolicyConfig
from rlpretrain.config.plugins import find
from rlpretrain.ranks import Ranks
from rlpretrain.training.backends.base import Policy, StepInfo
from rlpretrain.training.backends.deepspeed import DeepSpeedPolicy
from rlpretrain.training.backends.fsdp import FsdpPolicy
from rlpretrain.training.backends.torch import TorchPolicy

__all__ = [
    "DeepSpeedPolicy",
    "FsdpPolicy",
    "Policy",
    "StepInfo",
    "TorchPolicy",
    "backend_of",
    "find_backend",
    "make_policy",
]


BACKENDS: dict[str, Callable[..., Policy]] = {
    "torch": TorchPolicy,
    "deepspeed": DeepSpeedPolicy,
    "fsdp": FsdpPolicy,
}


def backend_of(config: PolicyConfig) -> str:
    """The name of the backend that `policy.backend` means: auto takes DeepSpeed where it is installed.

    Raises ConfigError if settings of one backend are used with another.
    """
    name = config.backend
    if name == "auto":
        name = "deepspeed" if compat.has_deepspeed() else "torch"
    if name in ("torch", "fsdp") and (config.zero_stage or config.deepspeed_config):
        raise ConfigError("policy.zero_stage and policy.deepspeed_config need policy.backend deepspeed")
    if name in ("torch", "deepspeed") and config.fsdp != FsdpConfig():
        raise ConfigError(f"policy.fsdp needs policy.backend fsdp, and this run has {name}")
    return name


def find_backend(config: PolicyConfig) -> Callable[..., Policy]:
    """The class that `policy.backend` means: one of `BACKENDS`, or the user's own class."""
    name = backend_of(config)
    return BACKENDS.get(name) or find(name, "policy.backend", ["auto", *BACKENDS])


def make_policy(
    model: nn.Module,
    config: PolicyConfig,
    optim: OptimConfig,
    total_steps: int,
    ranks: Ranks,
    temperature: float = 1.0,
    inner_epochs: int = 1,
) -> Policy:
    """The policy that `policy.backend` names."""
    return find_backend(config)(
        model.to(ranks.device), config, optim, total_steps, ranks, temperature, inner_epochs
    )
