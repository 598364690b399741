"""Tree attention in a Hugging Face model: which models can, and the attention function that they call."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rlpretrain.compat import attention_of
from rlpretrain.models.kernels import PREFIX
from rlpretrain.scoring.attention.cpu import TreeAttention
from rlpretrain.scoring.attention.flex import flex, padded_size
from rlpretrain.scoring.attention.probe import why_wrong
from rlpretrain.tree import Tree

_KINDS = {"full_attention", "sliding_attention"}


def why_not(model: Any) -> str | None:
    """Why tree packing does not support a Hugging Face model, by its configuration; None if it does."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    if not getattr(model, "_supports_attention_backend", False):
        return f"{type(model).__name__} does not take its attention from transformers' attention interface"
    if other := kinds - _KINDS:
        return f"it has layers of kind {', '.join(sorted(other))}, which tree packing does not support"
    if any(name.endswith("sinks") for name, _ in model.named_parameters()):
        return "its attention has sinks"
    if getattr(model.config, "is_encoder_decoder", False):
        return "it is an encoder-decoder"
    return None


def install(model: Any) -> str | None:
    """Add tree attention to a Hugging Face model, for forwards that are given `tree=...`.

    Other forwards are unchanged. Returns None, or why the model is not supported, and then changes nothing.
    A short tree is tried (`probe`), if the weights are whole on this rank.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

    before = attention_of(model)
    if (reason := why_not(model)) is not None or before.startswith(PREFIX):
        return reason
    if (reason := why_wrong(model, partial(_attend, before))) is not None:
        return reason
    # compiled layers call it as it is: it takes a tree, and compiles its own kernels
    AttentionInterface.register(PREFIX + before, torch.compiler.disable(partial(_attend, before)))
    AttentionMaskInterface.register(PREFIX + before, ALL_MASK_ATTENTION_FUNCTIONS[before])
    model.set_attn_implementation(PREFIX + before)
    return None


@contextmanager
def installed(model: Any) -> Iterator[str | None]:
    """`install` for the duration of the context; gives why the model is not supported, or None."""
    before = attention_of(model)
    reason = install(model)
    try:
        yield reason
    finally:
        if attention_of(model) != before:
            model.set_attn_implementation(before)


def uses_flex(x: Tensor) -> bool:
    """Whether trees of tensors like `x` are attended to by FlexAttention: those on a GPU (docs/gpu.md)."""
    return x.is_cuda


def pad_to_blocks(x: Tensor) -> Tensor:
    """Token ids or position ids [1, N] of a tree → [1, M] in whole blocks, where FlexAttention attends.

    So the model pads its input once, and not the query, key and value of every layer.
    """
    return nn.functional.pad(x, (0, padded_size(x.shape[1]) - x.shape[1])) if uses_flex(x) else x


def placeholder(device: torch.device) -> Tensor:
    """The attention mask passed beside a tree: four dimensions, so that transformers passes it unchanged."""
    return torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=device)


def _attend(
    before: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    tree: Tree | None = None,
    **kwargs: Any,
) -> Any:
    """The attention function that models call: query [1, H, N, D], key and value [1, K, N, D] → [1, N, H, D].

    Without a tree it calls the attention that the model had before. N includes padding, see `pad_to_blocks`.
    """
    if tree is None:
        from transformers import AttentionInterface

        eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        usual = AttentionInterface().get_interface(before, eager)  # pyright: ignore[reportArgumentType]
        return usual(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    if dropout or kwargs.get("s_aux") is not None or kwargs.get("position_bias") is not None:
        raise ValueError(
            "tree attention supports no dropout, attention sinks or position biases: use packing: padded"
        )
    if torch.is_autocast_enabled(query.device.type):  # as torch does for its own attention
        query, key, value = (x.to(torch.get_autocast_dtype(query.device.type)) for x in (query, key, value))
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    wide, widest = value.shape[-1], max(key.shape[-1], value.shape[-1])
    if key.shape[-1] != value.shape[-1]:  # DeepSeek's values are narrower than its keys
        query, key, value = (nn.functional.pad(x, (0, widest - x.shape[-1])) for x in (query, key, value))
    window, softcap = kwargs.get("sliding_window"), kwargs.get("softcap")
    window = window if window and window < tree.deepest else None
    if uses_flex(query):
        out = flex(query, key, value, tree, scale, window, softcap)
    else:
        out = TreeAttention.apply(query, key, value, tree, scale, window, softcap)
    return out[..., :wide].transpose(1, 2).contiguous(), None
