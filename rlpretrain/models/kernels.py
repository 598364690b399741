"""Whether the attention kernel of a model computes the model. `eager` does, others may leave parts out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rlpretrain.compat import attention_of, forward_of
from rlpretrain.config import ConfigError
from rlpretrain.models.lengths import limit_of
from rlpretrain.models.randomness import in_mode

PREFIX = "tree_"
"""Before the name of a kernel where a model attends along trees too (scoring/attention)."""

_LEFT_OUT = {"sdpa": {"softcap": "the soft cap on its attention scores", "s_aux": "its attention sinks"}}
"""What models hand to their attention function and a kernel of transformers drops without a word."""


@contextmanager
def attending_by(model: nn.Module, implementation: str | None) -> Iterator[None]:
    """While it lasts, `model` attends by another implementation of transformers' interface; None leaves it
    its own.
    """
    before = attention_of(model)
    if implementation is None or implementation == before:
        yield
        return
    model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def settle(model: nn.Module, asked: str | None = None) -> str | None:
    """Let a model attend by a kernel that computes its attention: eager, where the one that it has drops a
    part of it.

    transformers gives Gemma 2 `sdpa`, for instance, which knows no soft cap. Returns what was dropped, or
    None. `asked` is the kernel that the user named: ConfigError if that is the one.
    """
    before = attention_of(model).removeprefix(PREFIX)
    known = _LEFT_OUT.get(before, {})
    if not known or not getattr(model, "_supports_attention_backend", False):
        return None
    dropped = ", ".join(text for name, text in known.items() if name in _arguments(model))
    if dropped and asked == before:
        raise ConfigError(
            f"model.attn_implementation {asked}: {type(model).__name__} would lose {dropped}, which that "
            "kernel does not compute: use eager (or leave it out), or on a GPU one that does "
            "(flash_attention_2, flex_attention)"
        )
    if dropped:
        model.set_attn_implementation("eager")  # type: ignore[operator]
    return dropped or None


def _arguments(model: nn.Module) -> set[str]:
    """The names of what a model hands to its attention function, beside queries, keys and values."""
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

    before, found = attention_of(model), set[str]()
    usual = AttentionInterface().get_interface(before, None)

    def listen(*args: Any, **kwargs: Any) -> Any:
        found.update(name for name, value in kwargs.items() if value is not None)
        return usual(*args, **kwargs)

    AttentionInterface.register("listen", listen)
    AttentionMaskInterface.register("listen", ALL_MASK_ATTENTION_FUNCTIONS[before])
    with attending_by(model, "listen"), torch.no_grad():
        forward_of(model)(
            input_ids=torch.ones(1, 2, dtype=torch.long, device=next(model.parameters()).device)
        )
    return found


@torch.no_grad()
def check_kernel(model: nn.Module) -> float:
    """Mean difference (nats) between a model's log-probs by its attention kernel and by `eager`, which
    defines the model.

    Raises ConfigError above 1e-3 (.1 in half precision). 0 for models that do not take kernels from
    transformers' interface.
    """
    if not getattr(model, "_supports_attention_backend", False):
        return 0.0
    weight = model.get_input_embeddings().weight  # type: ignore[operator]
    limit = limit_of(model)
    size = min(48, limit.tokens) if limit else 48
    ids = torch.randint(weight.shape[0], (1, size), generator=torch.Generator().manual_seed(0)).to(
        weight.device
    )
    ask = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with in_mode(model, training=False):
        own = _next_logps(model, ask)
        with attending_by(model, "eager"):
            apart = float((_next_logps(model, ask) - own).abs().mean())
    half = weight.dtype != torch.float32 or torch.is_autocast_enabled(weight.device.type)
    if not apart <= (0.1 if half else 1e-3):
        kernel = attention_of(model).removeprefix(PREFIX)
        raise ConfigError(
            f"{type(model).__name__}: the attention kernel {kernel} computes another model than eager, by "
            f"{apart:.2e} nats a token: set model.attn_implementation to eager"
        )
    return apart


def _next_logps(model: nn.Module, ask: dict[str, Tensor]) -> Tensor:
    """Log-probs of the tokens of one row, from the model's own logits."""
    logits = forward_of(model)(**ask).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(-1, ask["input_ids"][0, 1:, None])[:, 0]
