"""What is checked and changed in the model of a TRL trainer before it is scored, and its baseline."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from rlpretrain.config import ConfigError
from rlpretrain.models.adapters import plain_name
from rlpretrain.models.kernels import attending_by, choose_kernel
from rlpretrain.models.randomness import check_deterministic, in_mode, switch_off
from rlpretrain.scoring.references import Baseline, Ema, Frozen, NoBaseline
from rlpretrain.trl.callback import ranks_of


def check_adapters(model: nn.Module, peft_model: Any, baseline: str) -> None:
    """Raise ConfigError for adapters that scoring does not see, or that `baseline` cannot turn off.

    `model` is the causal language model inside `peft_model`.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    if peft_model.active_peft_config.is_prompt_learning:
        raise ConfigError(
            "prompt and prefix tuning put vectors before the tokens, and scoring does not: train LoRA"
        )
    if isinstance(model.get_output_embeddings(), BaseTunerLayer):  # pyright: ignore[reportCallIssue]
        raise ConfigError(
            "the adapter's target_modules name the output head: scoring and TRL's own loss read the head's "
            "weight without that adapter; leave it out"
        )
    trained = [name for name, p in model.named_parameters() if p.requires_grad and plain_name(model, name)]
    prefix = getattr(peft_model.base_model, "prefix", "lora_")
    own = [name for name in trained if ".modules_to_save." not in name and prefix not in name]
    if baseline == "frozen" and own:
        raise ConfigError(
            f"baseline frozen: adapters can be turned off, but weights of the model itself are trained as "
            f"well ({own[0]}): freeze them (biases: bias='none'), or use self or none"
        )


def settle_model(model: nn.Module, attention: str | None, *, is_sharded: bool, reward_name: str) -> None:
    """Turn off what is random in the model, and let it attend by a kernel that computes all of its attention.

    The trainer then trains what it samples and scores. A warning says what was changed.
    """
    with attending_by(model, attention), in_mode(model, training=True):
        turned_off = switch_off(model, ask=not is_sharded)
        if not is_sharded:
            check_deterministic(model)
    if turned_off:
        warnings.warn(
            f"{reward_name}: set to 0 in the model, since thoughts are scored as sampled: "
            f"{', '.join(turned_off)}",
            stacklevel=3,
        )
    if not is_sharded and (dropped := choose_kernel(model)):
        warnings.warn(
            f"{reward_name}: the model now attends by eager, since its kernel does not compute {dropped}",
            stacklevel=3,
        )


def make_baseline(
    name: str,
    model: nn.Module,
    *,
    has_adapters: bool,
    is_sharded: bool,
    initial: Mapping[str, torch.Tensor],
    ema_decay: float,
) -> Baseline:
    """The baseline `name` of the library for a trainer's model.

    `initial` are weights of the model at the start of the run, where a checkpoint was loaded since.
    ConfigError for a baseline that such a model cannot have.
    """
    if name == "self":
        return Baseline()
    if name == "none":
        return NoBaseline()
    if has_adapters and name == "ema":
        raise ConfigError(
            "baseline ema has no meaning for adapters here: use frozen (adapters off), self or none"
        )
    if has_adapters:
        return Frozen(model, adapters_off=True, ranks=ranks_of(next(model.parameters()).device))
    if is_sharded:
        raise ConfigError(
            f"baseline {name} needs a whole copy of the model, which no rank has under ZeRO-3 and FSDP: use "
            "self or none (it cancels in the advantage), or train adapters"
        )
    whole = copy.deepcopy(model)
    if initial:
        whole.load_state_dict(dict(initial), strict=False)  # no buffers, and tied weights once
    return Ema(whole, ema_decay) if name == "ema" else Frozen(whole)
