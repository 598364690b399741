"""Tokenizers and models small enough to build inside a test: no file, no network, milliseconds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"

_COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "qwen3": {**_COMMON, "head_dim": 8, "tie_word_embeddings": True},
    "qwen2": {**_COMMON, "tie_word_embeddings": True},
    "llama": {**_COMMON, "tie_word_embeddings": False},
    "mistral": {**_COMMON, "head_dim": 8, "sliding_window": 16},
    "gemma2": {**_COMMON, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16},
    "qwen3_moe": {
        **_COMMON,
        "head_dim": 8,
        "moe_intermediate_size": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "gpt_neox": {k: v for k, v in _COMMON.items() if k != "num_key_value_heads"},
    "mamba": {
        "hidden_size": 32,
        "state_size": 4,
        "num_hidden_layers": 2,
        "conv_kernel": 4,
        "time_step_rank": 4,
    },
}
"""The smallest shapes that still show what each architecture does: grouped heads, soft-capping, windows,
tied heads.
"""


def word_tokenizer(words: Iterable[str]) -> PreTrainedTokenizerFast:
    """One token a word, split at white space. Ids: 0 pad, 1 eos, 2 unk, then `words` in their order."""
    vocab = {word: i for i, word in enumerate(dict.fromkeys([PAD, EOS, UNK, *words]))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, unk_token=UNK)


def bpe_tokenizer(lines: Iterable[str], vocab_size: int = 400) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on `lines`: leading spaces belong to tokens, a character may be split into
    bytes.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[PAD, EOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(lines, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS)


def tiny_model(
    architecture: str = "qwen3", vocab_size: int = 64, seed: int = 0, **overrides: Any
) -> PreTrainedModel:
    """A random model of about 20k parameters in eval mode, fp32; the same seed gives the same weights.

    `overrides` replace fields of the configuration. Special ids are those of `word_tokenizer`: 0 pad, 1 eos.
    The caller's random state is left as it was.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(f"no tiny '{architecture}'; there are {', '.join(ARCHITECTURES)}")
    fields = {
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 1,
        **ARCHITECTURES[architecture],
        **overrides,
    }
    config = AutoConfig.for_model(architecture, vocab_size=vocab_size, **fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.eval()
