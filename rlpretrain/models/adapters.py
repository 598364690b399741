"""LoRA on the policy: small trained matrices beside frozen weights (arXiv 2106.09685), by PEFT.

The model stays what transformers made; its linear layers are wrapped in place. Whoever asks for weights gets
merged ones under the names of the checkpoint, so engines and saved models know nothing of adapters; an engine
that can run an adapter beside its own base weights may get the adapter alone. With its adapters off the model
is the initial one: a frozen baseline needs no copy.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rlpretrain.config import ConfigError, LoraConfig, PretrainConfig

INSTALL = 'pip install "rlpretrain[peft]"'
NAME = "default"
_WRAPPERS = (".base_layer.", ".token_adapter.")


@dataclass(frozen=True)
class Piece:
    """One tensor to hand over: its name, the parameters it is made of (gathered first under ZeRO 3), and
    how.
    """

    name: str
    needs: tuple[nn.Parameter, ...]
    make: Callable[[], Tensor]


def check(config: PretrainConfig) -> None:
    """ConfigError for settings that adapters and quantised weights do not go with."""
    lora, quantised = config.policy.lora, config.model.quantization != "none"
    if quantised and lora is None:
        raise ConfigError(
            "model.quantization: rounded weights are not trained, adapters on them are: set policy.lora"
        )
    if quantised and config.baseline.name == "ema":
        raise ConfigError(
            "model.quantization: an average of rounded weights does not move: use baseline frozen, self or "
            "none"
        )
    if quantised and config.engine.reads_policy and config.engine.max_staleness:
        raise ConfigError(
            "model.quantization with engine hf needs engine.max_staleness 0: a copy takes no merged weights"
        )
    if quantised and config.policy.zero_stage == 3:
        raise ConfigError(
            "model.quantization: ZeRO 3 cannot shard rounded weights; use policy.zero_stage 2 or less"
        )
    if lora and lora.sync == "adapter" and not config.engine.takes_adapters:
        raise ConfigError(
            f"policy.lora.sync: adapter is for engine vllm_local; engine {config.engine.name} takes merged "
            "weights"
        )
    if config.model.quantization == "8bit" and not config.engine.reads_policy:
        raise ConfigError(
            f"model.quantization 8bit rounds what goes into a layer too, and engine {config.engine.name} "
            "would sample from another model: use 4bit, or engine hf"
        )
    if lora and lora.sync == "adapter" and (quantised or lora.use_dora):
        what = (
            "policy.lora.use_dora"
            if lora.use_dora
            else "model.quantization, whose rounded base vLLM does not have"
        )
        raise ConfigError(f"policy.lora.sync: adapter does not go with {what}: use merged")


def add_lora(model: nn.Module, config: LoraConfig, new_tokens: Sequence[int] = ()) -> nn.Module:
    """Freeze `model` and put trained adapters beside its layers, in place; ConfigError for layers that are
    not there.

    The rows of `new_tokens` are trained too, in the embedding and in the head: a tag that nobody ever saw
    means nothing else.
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError(f"policy.lora needs PEFT: {INSTALL}") from error
    if new_tokens and config.sync == "adapter":
        raise ConfigError(
            "policy.lora.sync: adapter has no way to hand over the thought delimiters that were added: use "
            "merged, or policy.lora.new_tokens: false, which leaves their embeddings as they begin"
        )
    targets = config.target_modules if isinstance(config.target_modules, str) else list(config.target_modules)
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]  # type: ignore[operator]
    tied = tables[0].weight is tables[1].weight
    names = {
        name.rpartition(".")[2]
        for name, m in model.named_modules()
        if any(m is t for t in tables[: 1 if tied else 2])
    }
    lora = peft.LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=0.0,
        target_modules=targets,
        task_type="CAUSAL_LM",
        use_dora=config.use_dora,
        trainable_token_indices={n: list(new_tokens) for n in names} if new_tokens else None,
    )
    try:
        model = peft.inject_adapter_in_model(lora, model, adapter_name=NAME)  # type: ignore[arg-type]
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"policy.lora.target_modules {config.target_modules}: {str(error).splitlines()[0]}"
        ) from None
    heads = [model.get_output_embeddings(), *([model.get_input_embeddings()] if tied else [])]  # type: ignore[operator]
    if any(hasattr(table, "lora_A") for table in heads):
        raise ConfigError(
            "policy.lora.target_modules names the output head, or the embedding it is tied to: scoring would "
            "not see that adapter; leave it out"
        )
    return model


def has_lora(model: nn.Module) -> bool:
    """Whether `add_lora` was here."""
    return NAME in getattr(model, "peft_config", {})


def new_tokens(model: Any) -> list[int]:
    """The tokens whose rows `add_lora` made trainable."""
    known = model.peft_config[NAME].trainable_token_indices or {}
    return list(next(iter(known.values()), []))


@contextmanager
def off(model: nn.Module) -> Iterator[None]:
    """While it lasts, the model computes what it did before it was given adapters, those of TRL's trainers
    included.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    layers: list[Any] = [
        m for m in model.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)
    ]
    layers = [layer for layer in layers if not layer.disable_adapters]
    trained = [(p, p.requires_grad) for layer in layers for p in layer.parameters()]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for p, grad in trained:  # which PEFT turns with them
            p.requires_grad_(grad)


def _is_adapter(name: str) -> bool:
    return ".lora_" in name or ".trainable_tokens_" in name


def pieces(model: nn.Module) -> Iterator[Piece]:
    """Every parameter under the names of the checkpoint, tied ones under each, with the adapters merged in,
    dequantised.

    Raises ConfigError for adapters that no checkpoint of the model can hold.
    """
    _check_mergeable(model)
    for name, p in model.named_parameters(remove_duplicate=False):
        plain, (owner, _, leaf) = plain_name(model, name), name.rpartition(".")
        if plain is None:
            continue
        layers: list[Any] = []  # wrapped around the owner, the innermost first
        while owner.endswith(".base_layer"):
            owner = owner.removesuffix(".base_layer")
            layers.append(model.get_submodule(owner))
        inside = [
            layer for layer in layers if getattr(layer, "parameter_name", None) == leaf
        ]  # of fused experts, one for each
        if inside:
            yield Piece(plain, tuple(layers[-1].parameters()), partial(_merged_parameter, p, inside))
        elif layers and leaf == "weight":
            (layer,) = layers
            yield Piece(plain, tuple(layer.parameters()), partial(_merged, layer))
        elif p.is_floating_point():
            yield Piece(plain, (p,), p.detach)
        else:
            yield Piece(plain, (p,), partial(_dense, model.get_submodule(owner)))


def plain_name(model: nn.Module, name: str) -> str | None:
    """What the checkpoint calls a parameter or buffer; None for what is not in it, adapters and modules
    out of use.
    """
    if _is_adapter(name) or ".original_module." in name:
        return None
    for wrapper in _WRAPPERS:
        while wrapper in name:
            name = name.replace(wrapper, ".")
    owner, kept, rest = name.partition(".modules_to_save.")
    if kept:
        which, _, leaf = rest.partition(".")
        return f"{owner}.{leaf}" if which in model.get_submodule(owner).active_adapters else None
    return name


def _check_mergeable(model: nn.Module) -> None:
    for name, layer in model.named_modules():
        if not hasattr(layer, "base_layer") or hasattr(layer, "get_merged_weights"):
            continue
        if not hasattr(layer, "lora_A"):
            raise ConfigError(
                f"{name} has an adapter that is not LoRA ({type(layer).__name__}): it cannot be merged here"
            )
        if any(getattr(layer, "lora_bias", {}).values()):
            raise ConfigError(f"{name}: lora_bias has no place in the merged weights: set lora_bias=False")
    causal: Any = model
    whole = [
        hasattr(table, "modules_to_save")
        for table in (causal.get_input_embeddings(), causal.get_output_embeddings())
    ]
    if causal.config.get_text_config().tie_word_embeddings and any(whole) and not all(whole):
        raise ConfigError(
            "modules_to_save has one of an embedding and a head that the checkpoint ties: merged they would "
            "be one again; leave it out, or train rows of both by trainable_token_indices"
        )


@torch.no_grad()
def _merged_parameter(parameter: nn.Parameter, layers: Sequence[Any]) -> Tensor:
    """The parameter of a module with the adapters in use that PEFT wraps around it."""
    weight = parameter.detach()
    for layer in layers:
        for name in layer.active_adapters:
            if name in layer.lora_A:
                weight = weight + layer.get_delta_weight(name).detach().to(weight.dtype)
    return weight


@torch.no_grad()
def _merged(layer: Any) -> Tensor:
    """The weight of a wrapped layer with its adapters in use."""
    if hasattr(layer, "get_merged_weights"):  # trained rows of a table
        return layer.get_merged_weights(layer.active_adapters).detach()
    weight = _dense(layer.base_layer)
    for name in layer.active_adapters:
        if (variant := layer.lora_variant.get(name)) is not None:  # DoRA
            weight = variant.merge_safe(layer, name, weight).detach()
        elif name in layer.lora_A or name in layer.lora_embedding_A:
            weight = weight + layer.get_delta_weight(name).detach().to(weight.dtype)
    return weight


def _dense(layer: Any) -> Tensor:
    if layer.weight.dtype == torch.int8:  # PEFT's own way takes the layer's scales away from it on a CPU
        scales = layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB
        return layer.weight.detach() * scales[:, None] / 127
    from peft.utils.integrations import dequantize_module_weight

    return dequantize_module_weight(layer).detach()


def adapter_pieces(model: nn.Module) -> Iterator[Piece]:
    """The adapters alone, named as in PEFT's files."""
    for name, p in model.named_parameters():
        if _is_adapter(name):
            short = (
                name.replace(f"_vector.{NAME}.weight", "_vector")
                .replace(f".{NAME}.", ".")
                .removesuffix(f".{NAME}")
            )
            yield Piece(f"base_model.model.{short}", (p,), p.detach)


@torch.no_grad()
def copy_adapter(model: nn.Module, adapter: Mapping[str, Tensor]) -> None:
    """Set the adapters of `model` to those that `adapter_pieces` gave of another."""
    for piece in adapter_pieces(model):
        piece.needs[0].copy_(adapter[piece.name])


def adapter_config(model: Any) -> dict[str, Any]:
    """What PEFT's adapter_config.json would hold."""
    plain = json.dumps(
        model.peft_config[NAME].to_dict(), default=lambda v: sorted(v) if isinstance(v, set) else str(v)
    )
    return json.loads(plain) | {"base_model_name_or_path": model.name_or_path or None}


def plain_copy(model: nn.Module) -> nn.Module:
    """A frozen copy without adapters: its weights are the base's until merged ones are copied into it."""
    twin: Any = copy.deepcopy(model).requires_grad_(False)
    for name, module in [(n, m) for n, m in twin.named_modules() if hasattr(m, "base_layer")]:
        parent, _, leaf = name.removesuffix(".token_adapter").rpartition(".")
        setattr(twin.get_submodule(parent), leaf, module.base_layer)
    if has_lora(twin):
        del twin.peft_config
    return twin
