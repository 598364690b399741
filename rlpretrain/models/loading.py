"""Loading a base checkpoint and its tokenizer from an ordinary Hugging Face folder, or from the hub."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.utils import logging as hf_logging

from rlpretrain.compat import INSTALL, keep_differentiable
from rlpretrain.config import ConfigError, ModelConfig
from rlpretrain.models.kernels import settle
from rlpretrain.models.randomness import checkpoint_layers
from rlpretrain.prompts import Delimiters, ensure_delimiters

logger = logging.getLogger(__name__)


def load_tokenizer(config: ModelConfig) -> Any:
    """The tokenizer of a checkpoint; ConfigError that says where it was looked for."""
    where = config.tokenizer or config.path
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            where, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except Exception as error:
        raise ConfigError(
            f"no tokenizer in '{where}': {_instead(where) or _no_tokenizer(where, error)}"
        ) from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # what transformers makes of a configuration alone
        why = _instead(where) or _no_tokenizer(where, OSError("its files are missing"))
        raise ConfigError(f"no tokenizer in '{where}': {why}")
    return tokenizer


def _instead(where: str) -> str:
    """What a folder without a model is, where that is known."""
    folder = Path(where)
    if (folder / "adapter_config.json").is_file():
        return "it is an adapter; the merged model of a run is `model` beside it"
    if (folder / "run.json").is_file():
        return f"it is a run's folder, the model is {folder / 'model'}"
    if folder.is_file():
        return "it is a file, and a folder with config.json and the weights is due"
    if not folder.is_dir() or (folder / "config.json").is_file():
        return ""
    names = sorted(file.name for file in folder.iterdir())
    if not names:
        return "the folder is empty"
    if any(name.endswith(".gguf") for name in names):
        return (
            "it holds GGUF files, which are for inference: give the checkpoint they were made from "
            "(config.json, safetensors)"
        )
    listed = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return (
        ""
        if any(name.startswith("tokenizer") for name in names)
        else f"the folder has no config.json; it holds {listed}"
    )


def _no_tokenizer(where: str, error: BaseException) -> str:
    """Why there is none: what transformers says of a folder without its files ends in a list of what it
    tried.
    """
    folder = Path(where)
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
    if (folder / "config.json").is_file() and not any((folder / name).is_file() for name in names):
        return (
            f"none of its files is there ({', '.join(names[:3])}, ...): copy them, or name a "
            "model.tokenizer that has them"
        )
    return reason(where, error)


@contextmanager
def no_bars() -> Iterator[None]:
    """Without transformers' progress bars, which would break into ours."""
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()


def load_model(config: ModelConfig, seed: int = 0) -> nn.Module:
    """The checkpoint, with nothing random in its forward: sampled and trained log-probs must agree.
    ConfigError if there is none.

    It attends by a kernel that computes its attention (`kernels.settle`).
    """
    form: dict[str, Any] = {"dtype": getattr(torch, config.dtype)}
    if config.attn_implementation:
        form["attn_implementation"] = config.attn_implementation
    if config.quantization != "none":
        form["quantization_config"] = _quantized(config)
    common = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    torch.manual_seed(seed)
    if config.from_scratch:
        try:
            shape = AutoConfig.from_pretrained(config.path, **common)
        except Exception as error:
            raise ConfigError(
                f"no model configuration in '{config.path}': {reason(config.path, error)}"
            ) from error
        model = AutoModelForCausalLM.from_config(shape, trust_remote_code=config.trust_remote_code, **form)
    else:
        try:
            with no_bars():
                model, found = AutoModelForCausalLM.from_pretrained(
                    config.path, output_loading_info=True, **form, **common
                )
        except Exception as error:
            hint = (
                " (a configuration without weights: from_scratch: true would initialise them)"
                if only_config(config.path)
                else ""
            )
            why = _instead(config.path) or reason(config.path, error)
            raise ConfigError(
                f"cannot load a causal language model from '{config.path}'{hint}: {why}"
            ) from error
        if lacking := sorted(found["missing_keys"]):
            raise ConfigError(
                f"the checkpoint '{config.path}' lacks {len(lacking)} weights of its model, for instance "
                f"{', '.join(lacking[:3])}: not a causal language model, or saved incompletely"
            )
    keep_differentiable(model)
    neutralise_generation(model)
    broken = [
        n for n, p in model.named_parameters() if p.is_floating_point() and not bool(torch.isfinite(p).all())
    ]
    if broken:
        raise ConfigError(
            f"the weights of '{config.path}' hold NaN or inf: {', '.join(broken[:3])} and {len(broken)} in "
            "all"
        )
    if dropped := settle(model, config.attn_implementation):
        logger.warning(
            "%s attends by eager: the usual kernel does not compute %s", type(model).__name__, dropped
        )
    model.eval()
    if config.gradient_checkpointing:
        checkpoint_layers(model)
    return model


def _quantized(config: ModelConfig) -> Any:
    """What transformers is told; the head and the embedding keep their precision."""
    if config.from_scratch:
        raise ConfigError("model.quantization is for a checkpoint, not for weights from_scratch")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError(f"model.quantization needs bitsandbytes: {INSTALL['qlora']}")
    if config.quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=getattr(torch, config.dtype)
    )


def load_with_tokenizer(
    config: ModelConfig, delimiters: Delimiters | None, seed: int = 0
) -> tuple[nn.Module, Any, list[str]]:
    """(model, tokenizer, delimiters that had to be added to both)."""
    tokenizer = load_tokenizer(config)
    model = load_model(config, seed)
    added = ensure_delimiters(tokenizer, model, delimiters) if delimiters is not None else []
    return model, tokenizer, added


def count(model: nn.Module) -> int:
    """Parameters, tied ones once, sharded and rounded ones as if whole."""
    sizes = [(p, getattr(p, "ds_numel", p.numel())) for p in model.parameters()]
    return sum(2 * n if p.dtype == torch.uint8 else n for p, n in sizes)  # a byte of nf4 holds two


def neutralise_generation(model: Any) -> None:
    """Unset what decoding never reads: `temperature` without `do_sample`, `length_penalty` without beams, a
    padding id of -1.

    Many checkpoints come with such a generation_config.json; transformers loads it and refuses to save it.
    Decoding stays as it is.
    """
    ends = getattr(model, "generation_config", None)
    if ends is None:
        return
    try:
        ends.validate(strict=True)
        return
    except ValueError:  # what is not named below stays, and `try_saving` says what it is
        unread: list[str] = []
    if ends.do_sample is not True:
        unread += [
            "temperature",
            "top_p",
            "min_p",
            "top_h",
            "typical_p",
            "top_k",
            "epsilon_cutoff",
            "eta_cutoff",
        ]
    if ends.num_beams in (None, 1):
        unread += ["early_stopping", "length_penalty"]
    if ends.pad_token_id is not None and ends.pad_token_id < 0:
        unread += ["pad_token_id"]
    if ends.use_cache is False:
        unread += ["cache_implementation", "cache_config"]
    if ends.return_dict_in_generate is not True:
        unread += ["output_scores", "output_logits", "output_attentions", "output_hidden_states"]
    for name in unread:
        if getattr(ends, name, None) is not None:
            setattr(ends, name, None)


def only_config(path: str) -> bool:
    folder = Path(path)
    return (
        (folder / "config.json").is_file()
        and not any(folder.glob("*.safetensors"))
        and not any(folder.glob("*.bin"))
    )


def reason(path: str, error: BaseException) -> str:
    """Why nothing could be loaded from `path`, in a line."""
    if (path.startswith((".", "/", "~")) or path.count("/") > 1) and not Path(path).exists():
        return "no such folder"  # transformers would speak of hub ids
    said = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    return said[0] if not said[0].endswith((":", ",")) else " ".join(" ".join(said).split())[:300]


load = load_with_tokenizer  # the name it had before
