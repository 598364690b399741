"""Numbers of parameters from the model's shape alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from rlpretrain.config import ConfigError, LoraConfig
from rlpretrain.models.adapters import add_lora


@dataclass(frozen=True, slots=True)
class ParameterCounts:
    """Numbers of parameters, tied ones counted once: all, the trained ones, and those of linear layers."""

    all: int
    trained: int
    linear: int
    """The head is not counted."""


def count_by_shape(
    shape: Any, trust_remote_code: bool = False, lora: LoraConfig | None = None
) -> ParameterCounts:
    """Count the parameters of the model that transformers builds from a configuration, allocating nothing.

    The adapters of `lora` are in `all` and `trained`.
    """
    try:
        with torch.device("meta"):
            built = AutoModelForCausalLM.from_config(shape, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise ConfigError(
            f"{type(shape).__name__} is no causal language model that transformers builds: {error}"
        ) from error
    head = built.get_output_embeddings()
    linear_layers = [m for m in built.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    linear = sum(layer.weight.numel() for layer in linear_layers)
    if lora:
        with torch.device("meta"):
            add_lora(built, lora)
    parameters = list(built.parameters())
    trained = [p for p in parameters if p.requires_grad]
    return ParameterCounts(sum(p.numel() for p in parameters), sum(p.numel() for p in trained), linear)


def count_tables(shape: Any) -> int:
    """Parameters of the embedding and the head."""
    text = shape.get_text_config()
    return (1 if text.tie_word_embeddings else 2) * text.vocab_size * text.hidden_size
