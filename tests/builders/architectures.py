"""Small models of many architectures."""

from __future__ import annotations

from typing import Any

from tests.builders.batches import VOCABULARY

SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "intermediate_size": 64,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
MORE: dict[str, dict[str, Any]] = {
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "falcon": {"alibi": True, "new_decoder_architecture": False, "multi_query": True},
    "bloom": {"n_layer": 2, "n_head": 4},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "rotary_dim": 4},
    "gpt_bigcode": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "mixtral": {"num_local_experts": 4},
    "phimoe": {"num_local_experts": 4},
    "phi": {},
    "phi3": {},
    "starcoder2": {},
    "granite": {},
    "cohere2": {},
    "stablelm": {},
    "gpt_oss": {"num_local_experts": 4, "head_dim": 8},
}
"""Architectures in whose layers dropout, layer dropping or router noise is kept in some other way."""
