"""What the library knows of a Hugging Face model: loading, saving, adapters, lengths, randomness, kernels,
operations.
"""

from rlpretrain.models.loading import count, load, load_model, load_tokenizer, load_with_tokenizer, reason
from rlpretrain.models.saving import model_card, push, save_model, save_start, try_saving

__all__ = [
    "count",
    "load",
    "load_model",
    "load_tokenizer",
    "load_with_tokenizer",
    "model_card",
    "push",
    "reason",
    "save_model",
    "save_start",
    "try_saving",
]
