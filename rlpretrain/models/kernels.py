"""Attention kernels that compute all of a model's attention. `eager` does; others may ignore parts of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rlpretrain.compat import attention_of, embedding_weight_of, forward_of
from rlpretrain.config import ConfigError
from rlpretrain.models.lengths import limit_of
from rlpretrain.models.randomness import in_mode

PREFIX = "tree_"
"""Prefix of a kernel's name if the kernel also supports tree attention (scoring/attention)."""

_IGNORED = {"sdpa": {"softcap": "the soft cap on its attention scores", "s_aux": "its attention sinks"}}
"""For a kernel of transformers, the arguments that it ignores without a warning, and what they are."""


@contextmanager
def attending_by(model: nn.Module, implementation: str | None) -> Iterator[None]:
    """Use another attention implementation for the duration of the context; None changes nothing."""
    original = attention_of(model)
    if implementation is None or implementation == original:
        yield
        return
    causal: Any = model
    causal.set_attn_implementation(implementation)
    try:
        yield
    finally:
        causal.set_attn_implementation(original)


def choose_kernel(model: nn.Module, requested: str | None = None) -> str | None:
    """Switch a model to eager attention if its kernel ignores a part of its attention.

    For instance, transformers gives Gemma 2 `sdpa`, which has no soft cap. Returns what the kernel ignores,
    or None. `requested` is the kernel that the user named: ConfigError if that kernel ignores a part.
    """
    kernel = attention_of(model).removeprefix(PREFIX)
    ignored = _IGNORED.get(kernel, {})
    if not ignored or not getattr(model, "_supports_attention_backend", False):
        return None
    dropped = ", ".join(
        description for name, description in ignored.items() if name in _attention_arguments(model)
    )
    if not dropped:
        return None
    if requested == kernel:
        raise ConfigError(
            f"model.attn_implementation {requested}: {type(model).__name__} would lose {dropped}, which that "
            "kernel does not compute: use eager (or leave it out), or on a GPU one that does "
            "(flash_attention_2, flex_attention)"
        )
    causal: Any = model
    causal.set_attn_implementation("eager")
    return dropped


def _attention_arguments(model: nn.Module) -> set[str]:
    """Return the names of the arguments that a model passes to its attention function by keyword."""
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

    kernel, arguments = attention_of(model), set[str]()
    interface: Any = AttentionInterface()
    attend = interface.get_interface(kernel, None)

    def record(*args: Any, **kwargs: Any) -> Any:
        arguments.update(name for name, value in kwargs.items() if value is not None)
        return attend(*args, **kwargs)

    AttentionInterface.register("listen", record)
    AttentionMaskInterface.register("listen", ALL_MASK_ATTENTION_FUNCTIONS[kernel])
    ids = torch.ones(1, 2, dtype=torch.long, device=next(model.parameters()).device)
    with attending_by(model, "listen"), torch.no_grad():
        forward_of(model)(input_ids=ids)
    return arguments


@torch.no_grad()
def check_kernel(model: nn.Module) -> float:
    """Return the mean difference (nats) of a model's log-probs between its attention kernel and `eager`.

    Eager attention defines the model. Raises ConfigError above 1e-3 (.1 in half precision). 0 for models
    that do not take kernels from transformers' interface.
    """
    if not getattr(model, "_supports_attention_backend", False):
        return 0.0
    weight = embedding_weight_of(model)
    limit = limit_of(model)
    size = min(48, limit.tokens) if limit else 48
    ids = torch.randint(weight.shape[0], (1, size), generator=torch.Generator().manual_seed(0))
    ids = ids.to(weight.device)
    with in_mode(model, training=False):
        kernel_logps = _next_logps(model, ids)
        with attending_by(model, "eager"):
            eager_logps = _next_logps(model, ids)
    difference = float((eager_logps - kernel_logps).abs().mean())
    half = weight.dtype != torch.float32 or torch.is_autocast_enabled(weight.device.type)
    if not difference <= (0.1 if half else 1e-3):
        kernel = attention_of(model).removeprefix(PREFIX)
        raise ConfigError(
            f"{type(model).__name__}: the attention kernel {kernel} computes another model than eager: "
            f"log-probs differ by {difference:.2e} nats per token. Set model.attn_implementation to eager"
        )
    return difference


def _next_logps(model: nn.Module, ids: Tensor) -> Tensor:
    """Return the log-probs of the tokens of one row [1, N], from the model's own logits."""
    output = forward_of(model)(input_ids=ids, attention_mask=torch.ones_like(ids))
    logits = output.logits[0, :-1].float()
    return logits.log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
