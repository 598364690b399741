"""The second model, which `reference.path` names: its vocabulary is checked, then it is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig

from rlpretrain import models
from rlpretrain.compat import embedding_weight_of
from rlpretrain.config import ConfigError, ModelConfig, PretrainConfig
from rlpretrain.data.fingerprints import vocabulary_fingerprint
from rlpretrain.models.load_errors import explain_load_error, only_config
from rlpretrain.models.loading import load_tokenizer
from rlpretrain.prompts import AddedTokens, ensure_delimiters
from rlpretrain.scoring.checks import check_model


def reference_model_config(config: PretrainConfig) -> ModelConfig:
    """The settings by which the reference is loaded: its own, and those of `model` where it has none."""
    own, model = config.reference, config.model
    assert own.path is not None, "without a path the reference is the initial model"
    return ModelConfig(
        path=own.path,
        tokenizer=own.tokenizer,
        revision=own.revision,
        dtype=own.dtype or model.dtype,
        attn_implementation=own.attn_implementation or model.attn_implementation,
        trust_remote_code=own.trust_remote_code,
    )


def is_local(config: ModelConfig) -> bool:
    """Whether a checkpoint and its tokenizer are folders on this machine."""
    return Path(config.path).is_dir() and (config.tokenizer is None or Path(config.tokenizer).is_dir())


def check_vocabulary(config: PretrainConfig, delimiters: AddedTokens | None) -> None:
    """Raise ConfigError if the reference gives other ids to a text, or has another number of logits.

    It needs no weights. The thought delimiters count as added to both tokenizers.
    """
    other = reference_model_config(config)
    tokenizers = [load_tokenizer(each) for each in (config.model, other)]
    if delimiters is not None:
        for tokenizer in tokenizers:
            ensure_delimiters(tokenizer, None, delimiters)
    ours, theirs = map(vocabulary_fingerprint, tokenizers)
    if ours != theirs:
        raise ConfigError(
            f"reference.path '{other.path}' has another tokenizer than the model: "
            f"{_explain_difference(*tokenizers)}. Its log-probs of the model's ids would mean other texts: "
            "choose a reference that was trained from the same base"
        )
    sizes = [reference_shape(each).get_text_config().vocab_size for each in (config.model, other)]
    if sizes[0] != sizes[1]:
        raise ConfigError(_sizes_differ(other.path, *sizes))


def reference_shape(config: ModelConfig) -> Any:
    """The Hugging Face configuration of a checkpoint; ConfigError where there is none."""
    try:
        return AutoConfig.from_pretrained(
            config.path, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except Exception as error:
        reason = explain_load_error(config.path, error)
        raise ConfigError(f"no model configuration in '{config.path}': {reason}") from error


def load_reference(
    config: PretrainConfig, delimiters: AddedTokens | None, model: nn.Module, device: torch.device
) -> nn.Module:
    """The frozen model of `reference.path` on `device`; ConfigError if it cannot score the texts of `model`.

    It changes no random number of the run.
    """
    other = reference_model_config(config)
    if only_config(other.path):
        raise ConfigError(f"reference.path '{other.path}' has a configuration but no weights")
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        loaded, _, _ = models.load_with_tokenizer(other, delimiters, config.seed)
    rows = [embedding_weight_of(each).shape[0] for each in (model, loaded)]
    if rows[0] != rows[1]:
        raise ConfigError(_sizes_differ(other.path, *rows))
    check_model(loaded.requires_grad_(False).to(device))
    return loaded


def _sizes_differ(path: str, ours: int, theirs: int) -> str:
    return (
        f"reference.path '{path}' has {theirs:,} rows of embeddings, the model has {ours:,}: their "
        "probabilities are over different vocabularies. Resize one of them to the size of the other"
    )


def _explain_difference(ours: Any, theirs: Any) -> str:
    """What distinguishes two tokenizers, in a few words."""
    own, other = ours.get_vocab(), theirs.get_vocab()
    moved = sorted(token for token in own.keys() | other.keys() if own.get(token) != other.get(token))
    if not moved:
        return "the tokens are the same, but texts are split in another way"
    token = moved[0]
    return (
        f"{len(moved):,} tokens differ, for instance {token!r}, which has id {own.get(token)} in the model's "
        f"and {other.get(token)} in its"
    )
