"""Hugging Face models: loading, saving, adapters, lengths, randomness, attention kernels, operations."""

from rlpretrain.models.load_errors import explain_load_error
from rlpretrain.models.loading import (
    LoadedModel,
    count_parameters,
    load,
    load_model,
    load_tokenizer,
    load_with_tokenizer,
)
from rlpretrain.models.saving import model_card, push, save_model, save_start, try_saving

__all__ = [
    "LoadedModel",
    "count_parameters",
    "explain_load_error",
    "load",
    "load_model",
    "load_tokenizer",
    "load_with_tokenizer",
    "model_card",
    "push",
    "save_model",
    "save_start",
    "try_saving",
]
