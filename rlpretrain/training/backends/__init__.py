"""The trained model behind six methods: score, backward, step, weights, save, load. Torch and DeepSpeed do the same.

The loss that `backward` takes is already divided by the step's global counts, so gradients are *summed* over micro-batches
and over ranks.
"""

from __future__ import annotations

from torch import nn

from rlpretrain import compat
from rlpretrain.config import ConfigError, OptimConfig, PolicyConfig
from rlpretrain.ranks import Ranks
from rlpretrain.training.backends.base import StepInfo
from rlpretrain.training.backends.deepspeed import DeepSpeedPolicy
from rlpretrain.training.backends.torch import TorchPolicy

__all__ = ["DeepSpeedPolicy", "StepInfo", "TorchPolicy", "make_policy"]


def make_policy(model: nn.Module, config: PolicyConfig, optim: OptimConfig, total_steps: int, ranks: Ranks,
                temperature: float = 1.0, inner_epochs: int = 1) -> TorchPolicy | DeepSpeedPolicy:  # fmt: skip
    """The policy that `policy.backend` names; auto takes DeepSpeed where it is installed."""
    backend = config.backend
    if backend == "auto":
        backend = "deepspeed" if compat.has_deepspeed() else "torch"
    if backend == "torch" and (config.zero_stage or config.deepspeed_config):
        raise ConfigError("policy.zero_stage and policy.deepspeed_config need policy.backend deepspeed")
    owner = TorchPolicy if backend == "torch" else DeepSpeedPolicy
    return owner(model.to(ranks.device), config, optim, total_steps, ranks, temperature, inner_epochs)
