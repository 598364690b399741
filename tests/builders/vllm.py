"""Shape of the models that vLLM serves in tests, and what is done with them; importing this needs vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.builders.sampling import VOCABULARY, ask, move, weights_of, worst
from tests.builders.tiny import tiny_model, word_tokenizer

pytest.importorskip("vllm", reason="needs the CPU build of vLLM: make env LOCK=test-cpu")

__all__ = ["SHAPE", "VOCABULARY", "ask", "move", "served_model", "weights_of", "worst"]
SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "initializer_range": 0.3,
    "max_position_embeddings": 512,
}


def served_model(folder: Path) -> Any:
    """A small random model, saved with a tokenizer of words in `folder`, which it has as an attribute."""
    model: Any = tiny_model("qwen3", VOCABULARY, **SHAPE, tie_word_embeddings=True)
    model.folder = folder
    model.save_pretrained(folder)
    word_tokenizer([f"w{i}" for i in range(VOCABULARY - 3)]).save_pretrained(folder)
    return model
