"""Loading a base checkpoint and its tokenizer from a Hugging Face folder, or from the hub."""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from rlpretrain.compat import keep_differentiable, require_library, without_progress_bars
from rlpretrain.config import ConfigError, ModelConfig
from rlpretrain.models.kernels import choose_kernel
from rlpretrain.models.load_errors import (
    explain_load_error,
    explain_model_error,
    explain_tokenizer_error,
    only_config,
)
from rlpretrain.models.randomness import checkpoint_layers
from rlpretrain.models.spending import count_elements
from rlpretrain.prompts import AddedTokens, ensure_delimiters

logger = logging.getLogger(__name__)


class LoadedModel(NamedTuple):
    """A model with its tokenizer."""

    model: nn.Module
    tokenizer: Any
    added_tags: list[str]
    """The thought delimiters, or control tokens, that had to be added to both."""


def load_with_tokenizer(config: ModelConfig, delimiters: AddedTokens | None, seed: int = 0) -> LoadedModel:
    """Load a checkpoint and its tokenizer, and make the thought delimiters tokens of both."""
    tokenizer = load_tokenizer(config)
    model = load_model(config, seed)
    added_tags = ensure_delimiters(tokenizer, model, delimiters) if delimiters is not None else []
    return LoadedModel(model, tokenizer, added_tags)


def load_tokenizer(config: ModelConfig) -> Any:
    """Load the tokenizer of a checkpoint; ConfigError with the path and the reason if there is none."""
    path = config.tokenizer or config.path
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except Exception as error:
        raise ConfigError(f"no tokenizer in '{path}': {explain_tokenizer_error(path, error)}") from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # transformers makes this from a configuration alone
        missing = OSError("its files are missing")
        raise ConfigError(f"no tokenizer in '{path}': {explain_tokenizer_error(path, missing)}")
    return tokenizer


def load_model(config: ModelConfig, seed: int = 0) -> nn.Module:
    """Load a checkpoint in evaluation mode; ConfigError if that is not possible.

    Nothing in its forward is random, since sampled and trained log-probs must agree, and its attention kernel
    computes all of its attention (`kernels.choose_kernel`).
    """
    options: dict[str, Any] = {"dtype": getattr(torch, config.dtype)}
    if config.attn_implementation:
        options["attn_implementation"] = config.attn_implementation
    if config.quantization != "none":
        options["quantization_config"] = _quantization_config(config)
    torch.manual_seed(seed)
    model = _initialise(config, options) if config.from_scratch else _load_checkpoint(config, options)
    keep_differentiable(model)
    neutralise_generation(model)
    _check_finite(model, config.path)
    if dropped := choose_kernel(model, config.attn_implementation):
        logger.warning(
            "%s uses eager attention: the default kernel does not compute %s", type(model).__name__, dropped
        )
    model.eval()
    if config.gradient_checkpointing:
        checkpoint_layers(model, offload=config.activation_offloading)
    return model


def _initialise(config: ModelConfig, options: dict[str, Any]) -> nn.Module:
    """Make a model with random weights from the configuration at `config.path`."""
    try:
        model_config = AutoConfig.from_pretrained(
            config.path, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except Exception as error:
        raise ConfigError(
            f"no model configuration in '{config.path}': {explain_load_error(config.path, error)}"
        ) from error
    return AutoModelForCausalLM.from_config(
        model_config, trust_remote_code=config.trust_remote_code, **options
    )


def _load_checkpoint(config: ModelConfig, options: dict[str, Any]) -> nn.Module:
    """Load a model with all of its weights."""
    try:
        with without_progress_bars():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                config.path,
                output_loading_info=True,
                revision=config.revision,
                trust_remote_code=config.trust_remote_code,
                **options,
            )
            model, info = loaded
    except Exception as error:
        hint = ""
        if only_config(config.path):
            hint = " (a configuration without weights: from_scratch: true would initialise them)"
        reason = explain_model_error(config.path, error)
        raise ConfigError(
            f"cannot load a causal language model from '{config.path}'{hint}: {reason}"
        ) from error
    if missing := sorted(info["missing_keys"]):
        raise ConfigError(
            f"the checkpoint '{config.path}' lacks {len(missing)} weights of its model, for instance "
            f"{', '.join(missing[:3])}: it is not a causal language model, or was saved incompletely"
        )
    return model


def _quantization_config(config: ModelConfig) -> BitsAndBytesConfig:
    """Return transformers' settings; the head and the embedding keep their precision."""
    if config.from_scratch:
        raise ConfigError("model.quantization is for a checkpoint, not for weights from_scratch")
    require_library("bitsandbytes", "qlora", "model.quantization needs bitsandbytes")
    if config.quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=getattr(torch, config.dtype)
    )


def _check_finite(model: nn.Module, path: str) -> None:
    """Raise ConfigError if weights are NaN or infinite."""
    broken = [
        name
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point() and not bool(torch.isfinite(parameter).all())
    ]
    if broken:
        raise ConfigError(
            f"the weights of '{path}' hold NaN or inf: {', '.join(broken[:3])}; {len(broken)} in all"
        )


def count_parameters(model: nn.Module) -> int:
    """Count a model's parameters: tied ones once, sharded and quantised ones with their full size."""
    return sum(map(count_elements, model.parameters()))


def neutralise_generation(model: Any) -> None:
    """Unset generation settings that decoding ignores, so that transformers can save the model.

    Examples are `temperature` without `do_sample`, `length_penalty` without beams, and a padding id of -1.
    Many checkpoints come with such a generation_config.json. transformers loads it and refuses to save it.
    """
    settings = getattr(model, "generation_config", None)
    if settings is None:
        return
    try:
        settings.validate(strict=True)
        return
    except ValueError:  # a setting not listed below stays, and `try_saving` names it
        ignored: list[str] = []
    if settings.do_sample is not True:
        ignored += [
            "temperature",
            "top_p",
            "min_p",
            "top_h",
            "typical_p",
            "top_k",
            "epsilon_cutoff",
            "eta_cutoff",
        ]
    if settings.num_beams in (None, 1):
        ignored += ["early_stopping", "length_penalty"]
    if settings.pad_token_id is not None and settings.pad_token_id < 0:
        ignored += ["pad_token_id"]
    if settings.use_cache is False:
        ignored += ["cache_implementation", "cache_config"]
    if settings.return_dict_in_generate is not True:
        ignored += ["output_scores", "output_logits", "output_attentions", "output_hidden_states"]
    for name in ignored:
        if getattr(settings, name, None) is not None:
            setattr(settings, name, None)


load = load_with_tokenizer  # the name it had before
