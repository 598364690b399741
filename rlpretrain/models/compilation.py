"""Layers compiled by torch, for scoring and training.

Between the matrix products of a layer stand norms, rotations and activation functions, each of which reads
and writes all hidden states. Compiled, they become few kernels. Measured on a GPU: docs/gpu.md.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_iter
from transformers.modeling_layers import GradientCheckpointingLayer

from rlpretrain.compat import compile_call
from rlpretrain.config import ConfigError, PretrainConfig


def check(config: PretrainConfig, backend: str) -> None:
    """Check the settings beside `model.compile`; `backend` trains the model. Raises ConfigError."""
    if not config.model.compile:
        return
    if backend != "torch":
        raise ConfigError(
            "model.compile needs policy.backend torch: other backends put hooks into layers, at which "
            "compiled code stops"
        )
    if torch.cuda.is_available() and importlib.util.find_spec("triton") is None:
        raise ConfigError("model.compile on a GPU needs Triton: pip install triton")


def compile_layers(model: Any, backend: str = "inductor") -> None:
    """Let torch compile each decoder layer: at its first call, and once more for all other lengths.

    Attention along trees compiles itself and is left out. Calls with a cache of keys and values, as in
    decoding, run as before: their sizes change with every token. Copies of the model are not compiled.
    ConfigError if the model's layers are not those of transformers.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ConfigError(
            f"model.compile: {type(model).__name__} has no layers of transformers' kind; set it to false"
        )
    for layer in layers:
        compile_call(layer, backend, mark_lengths)


def mark_lengths(arguments: Any) -> None:
    """Tell the compiler which dimensions of a layer's tensors change: rows and tokens.

    Hidden states, rotations and position ids have them first, masks [R, 1, tokens, tokens] first and last.
    """
    for x in tree_iter(arguments):
        if isinstance(x, torch.Tensor):
            for dim in (0, 2, 3) if x.dim() == 4 else (0, 1):
                if dim < x.dim() and x.shape[dim] > 1:
                    torch._dynamo.maybe_mark_dynamic(x, dim)


def is_compiled(layer: nn.Module) -> bool:
    """Whether calls of the layer without a cache are compiled."""
    return getattr(layer, "_compiled_call_impl", None) is not None
