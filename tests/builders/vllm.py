"""Shape of the models that vLLM serves in tests, and what is done with them; importing this needs vLLM."""

from __future__ import annotations

from typing import Any

import pytest

from tests.builders.sampling import VOCABULARY, ask, move, weights_of, worst

pytest.importorskip("vllm", reason="needs the CPU build of vLLM: make env LOCK=test-cpu")

__all__ = ["SHAPE", "VOCABULARY", "ask", "move", "weights_of", "worst"]
SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "initializer_range": 0.3,
    "max_position_embeddings": 512,
}
