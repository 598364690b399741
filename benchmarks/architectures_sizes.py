"""Small sizes for the architectures of `benchmarks.architectures`."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
    "sliding_window": 16,
    "initializer_range": 0.2,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
"""Set wherever a configuration has a field of that name."""
_HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
_LINEAR = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_expand": 2}
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
_MLA = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
    "head_dim": 8,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "ministral": {},
    "qwen2": {},
    "qwen3": {},
    "qwen3_5_text": _LINEAR | _HYBRID,
    "qwen3_next": _LINEAR | _HYBRID,
    "gemma": {},
    "gemma2": {"query_pre_attn_scalar": 8},
    "gemma3_text": {"query_pre_attn_scalar": 8},
    "gemma3n_text": {
        "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 0,
        "laurel_rank": 4,
        "intermediate_size": [64, 64],
        "layer_types": ["sliding_attention", "full_attention"],
        "activation_sparsity_pattern": [0.0, 0.0],
    },
    "gemma4_text": {
        "hidden_size_per_layer_input": 8,
        "global_head_dim": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "phi": {},
    "phi3": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": {},
    "smollm3": {},
    "stablelm": {},
    "starcoder2": {},
    "cohere": {},
    "cohere2": {},
    "glm": {},
    "glm4": {},
    "granite": {},
    "nemotron": {},
    "exaone4": {"layer_types": ["sliding_attention", "full_attention"]},
    "ernie4_5": {},
    "seed_oss": {},
    "arcee": {},
    "apertus": {},
    "helium": {},
    "gpt2": _GPT,
    "gpt_bigcode": _GPT,
    "gpt_neo": {
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 16,
    },
    "gpt_neox": {},
    "gptj": _GPT | {"rotary_dim": 8},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "bloom": {"n_layer": 2, "n_head": 4},
    "falcon": {"num_kv_heads": 2, "ffn_hidden_size": 64},
    "mixtral": {},
    "qwen3_moe": {},
    "qwen3_5_moe_text": _LINEAR | _HYBRID,
    "olmoe": {},
    "granitemoe": {},
    "phimoe": {},
    "glm4_moe": {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "deepseek_v2": _MLA | {"topk_method": "greedy"},
    "deepseek_v3": _MLA,
    "minimax_m2": {},
    "gpt_oss": {"layer_types": ["sliding_attention", "full_attention"]},
    "llama4_text": {"intermediate_size_mlp": 64, "attention_chunk_size": 64},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "granitemoehybrid": _MAMBA | {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 16},
    "falcon_h1": _MAMBA | {"mamba_d_ssm": 64},
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention", "moe"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "n_groups": 1,
        "moe_shared_expert_intermediate_size": 16,
    },
    "jamba": {"mamba_dt_rank": 4, "mamba_d_state": 8, "attn_layer_period": 2, "attn_layer_offset": 1},
    "bamba": _MAMBA | {"attn_layer_indices": [1]},
    "mamba": {"state_size": 4, "time_step_rank": 4},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1},
    "recurrent_gemma": {
        "attention_window_size": 16,
        "lru_width": 32,
        "block_types": ["recurrent", "attention"],
    },
}
"""What differs from `_SIZES`, by the type that AutoConfig knows."""


def random_model(name: str, vocabulary: int, **changes: Any) -> Any:
    """A random model of a type, in float32; `changes` replace fields of its configuration."""
    fields = AutoConfig.for_model(name).to_dict()
    words = {"vocab_size": vocabulary, "vocab_size_per_layer_input": vocabulary}
    sizes = {key: value for key, value in (_SIZES | words).items() if key in fields}
    config = AutoConfig.for_model(name, **sizes | MODELS[name] | changes)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
