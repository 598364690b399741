"""LoRA on the policy: small trained matrices beside frozen weights (arXiv 2106.09685), with PEFT.

PEFT wraps the model's linear layers in place. Engines and saved models get merged weights under the names of
the checkpoint (`models.merging`), so they are independent of adapters. An engine that can run adapters on its
own base weights may get the adapter alone. With its adapters off the model is the initial model, so a frozen
baseline needs no copy.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rlpretrain.compat import require_library
from rlpretrain.config import ConfigError, LoraConfig, PretrainConfig
from rlpretrain.models.merging import Piece, is_adapter, pieces, plain_name
from rlpretrain.ranks import is_gpu

__all__ = [
    "Piece",
    "adapter_config",
    "adapter_pieces",
    "add_lora",
    "check",
    "copy_adapter",
    "has_lora",
    "new_tokens",
    "off",
    "pieces",
    "plain_copy",
    "plain_name",
]

NAME = "default"


def check(config: PretrainConfig) -> None:
    """Raise ConfigError for settings that do not work with adapters or quantised weights."""
    lora, quantised = config.policy.lora, config.model.quantization != "none"
    if quantised and lora is None:
        raise ConfigError(
            "model.quantization: quantised weights cannot be trained, only adapters on them: set policy.lora"
        )
    if quantised and config.baseline.name == "ema":
        raise ConfigError(
            "model.quantization: an average of quantised weights does not move: use baseline frozen, self or "
            "none"
        )
    if quantised and config.engine.reads_policy and config.engine.max_staleness:
        raise ConfigError(
            "model.quantization with engine hf needs engine.max_staleness 0: a copy of a quantised model "
            "cannot take merged weights"
        )
    if quantised and config.policy.zero_stage == 3:
        raise ConfigError(
            "model.quantization: ZeRO 3 cannot shard quantised weights; use policy.zero_stage 2 or less"
        )
    if lora and lora.sync == "adapter" and not config.engine.takes_adapters:
        raise ConfigError(
            f"policy.lora.sync: adapter is for engine vllm_local; engine {config.engine.name} needs merged "
            "weights"
        )
    if config.model.quantization == "8bit" and not config.engine.reads_policy:
        raise ConfigError(
            f"model.quantization 8bit also rounds the inputs of layers, so engine {config.engine.name} would "
            "sample from another model: use 4bit, or engine hf"
        )
    precision = config.engine.dtype or config.model.dtype
    if lora and lora.sync == "adapter" and precision == "float32" and is_gpu(config.device):
        raise ConfigError(
            "policy.lora.sync: adapter needs half precision on a GPU, since vLLM's kernels for adapters take "
            "no float32: set engine.dtype to bfloat16, or use merged"
        )
    if lora and lora.sync == "adapter" and lora.use_dora:
        raise ConfigError("policy.lora.sync: adapter does not work with policy.lora.use_dora: use merged")
    if lora and lora.sync == "adapter" and quantised:
        raise ConfigError(
            "policy.lora.sync: adapter does not work with model.quantization, since vLLM does not have the "
            "quantised base: use merged"
        )


def add_lora(model: nn.Module, config: LoraConfig, new_tokens: Sequence[int] = ()) -> nn.Module:
    """Freeze `model` and add trained adapters to its layers, in place; ConfigError for unknown layers.

    The rows of `new_tokens` in the embedding and in the head are trained too, because a tag that the
    checkpoint has never seen has no meaning yet.
    """
    require_library("peft", "peft", "policy.lora needs PEFT")
    import peft

    if new_tokens and config.sync == "adapter":
        raise ConfigError(
            "policy.lora.sync: adapter cannot pass on the embeddings of the thought delimiters that were "
            "added: use merged, or policy.lora.new_tokens: false, which does not train those embeddings"
        )
    causal: Any = model
    embedding, head = causal.get_input_embeddings(), causal.get_output_embeddings()
    tied = embedding.weight is head.weight
    lora = peft.LoraConfig(
        r=config.r,
        # declared int, but PEFT computes with floats
        lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=0.0,
        exclude_modules=_unadaptable(model) if config.target_modules == "all-linear" else None,
        target_modules=(
            config.target_modules if isinstance(config.target_modules, str) else list(config.target_modules)
        ),
        task_type="CAUSAL_LM",
        use_dora=config.use_dora,
        trainable_token_indices=(
            _rows_by_table(model, [embedding] if tied else [embedding, head], new_tokens)
            if new_tokens
            else None
        ),
    )
    try:
        causal = peft.inject_adapter_in_model(lora, model, adapter_name=NAME)
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"policy.lora.target_modules {config.target_modules}: {str(error).splitlines()[0]}"
        ) from None
    head_tables = [causal.get_output_embeddings()]
    if tied:
        head_tables.append(causal.get_input_embeddings())
    if any(hasattr(table, "lora_A") for table in head_tables):
        raise ConfigError(
            "policy.lora.target_modules names the output head, or the embedding it is tied to: scoring would "
            "ignore that adapter; leave it out"
        )
    return causal


def _unadaptable(model: nn.Module) -> list[str] | None:
    """Names of linear layers that an adapter would break, or that would ignore it; None if there are none.

    A linear layer of a model's own kind may return something else than a product (PhiMoE's router does). The
    output of a Mamba mixer may be computed by a kernel that reads the layer's weight and never calls it.
    """
    names = [name for name, module in model.named_modules() if not _gives_product(module)]
    for name, module in model.named_modules():
        if all(hasattr(module, part) for part in ("A_log", "D", "out_proj")):
            names.append(f"{name}.out_proj")
    return names or None


@torch.no_grad()
def _gives_product(module: nn.Module) -> bool:
    """Whether a linear layer of a model's own kind returns a tensor; True for all other modules."""
    own = type(module).__module__.startswith(("transformers.models.", "transformers_modules."))
    if not isinstance(module, nn.Linear) or not own:
        return True
    weight = module.weight
    return isinstance(module(weight.new_zeros(1, module.in_features)), Tensor)


def _rows_by_table(
    model: nn.Module, tables: Sequence[nn.Module], rows: Sequence[int]
) -> dict[str, list[int]]:
    """Return for the name of each table the rows to train, as PEFT's `trainable_token_indices`."""
    names = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if any(module is table for table in tables)
    }
    return {name: list(rows) for name in names}


def has_lora(model: nn.Module) -> bool:
    """Return whether `add_lora` has added adapters to the model."""
    return NAME in getattr(model, "peft_config", {})


def new_tokens(model: Any) -> list[int]:
    """Return the tokens whose rows `add_lora` made trainable."""
    rows_by_table = model.peft_config[NAME].trainable_token_indices or {}
    return list(next(iter(rows_by_table.values()), []))


@contextmanager
def off(model: nn.Module) -> Iterator[None]:
    """Turn all adapters off for the duration of the context, those of TRL's trainers included."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    wrappers: list[Any] = [
        m for m in model.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)
    ]
    layers = [layer for layer in wrappers if not layer.disable_adapters]
    requires_grad = [(p, p.requires_grad) for layer in layers for p in layer.parameters()]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, value in requires_grad:  # PEFT changes it too
            parameter.requires_grad_(value)


def adapter_pieces(model: nn.Module) -> Iterator[Piece]:
    """Yield the adapters alone, under the names of PEFT's files."""
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            short = name.replace(f"_vector.{NAME}.weight", "_vector").replace(f".{NAME}.", ".")
            file_name = f"base_model.model.{short.removesuffix(f'.{NAME}')}"
            yield Piece(file_name, (parameter,), parameter.detach)


@torch.no_grad()
def copy_adapter(model: nn.Module, adapter: Mapping[str, Tensor]) -> None:
    """Set the adapters of `model` to `adapter`, the tensors of another model's `adapter_pieces` by name."""
    for piece in adapter_pieces(model):
        piece.needs[0].copy_(adapter[piece.name])


def adapter_config(model: Any) -> dict[str, Any]:
    """Return the content of PEFT's adapter_config.json."""
    settings = model.peft_config[NAME].to_dict()
    text = json.dumps(settings, default=lambda value: sorted(value) if isinstance(value, set) else str(value))
    return json.loads(text) | {"base_model_name_or_path": model.name_or_path or None}


def plain_copy(model: nn.Module) -> nn.Module:
    """Return a frozen copy without adapters: it has the base weights until merged weights are copied in."""
    plain: Any = copy.deepcopy(model).requires_grad_(False)
    wrapped = [(name, module) for name, module in plain.named_modules() if hasattr(module, "base_layer")]
    for name, module in wrapped:
        parent, _, leaf = name.removesuffix(".token_adapter").rpartition(".")
        setattr(plain.get_submodule(parent), leaf, module.base_layer)
    if has_lora(plain):
        del plain.peft_config
    return plain
