"""Hints for unknown field names: names that other libraries use, the same name elsewhere, similar names."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from rlpretrain.config.base import Varied

ALIASES = {
    "learning_rate": "optim.lr",
    "lr_scheduler_type": "optim.schedule",
    "lr_scheduler": "optim.schedule",
    "scheduler": "optim.schedule",
    "warmup": "optim.warmup_steps",
    "num_warmup_steps": "optim.warmup_steps",
    "adam_beta1": "optim.betas",
    "adam_beta2": "optim.betas",
    "grad_clip": "optim.clip_grad_norm",
    "max_grad_norm": "optim.clip_grad_norm",
    "gradient_clipping": "optim.clip_grad_norm",
    "batch_size": "positions_per_step",
    "train_batch_size": "positions_per_step",
    "global_batch_size": "positions_per_step",
    "per_device_train_batch_size": "token_budget",
    "micro_batch_size": "token_budget",
    "gradient_accumulation_steps": "token_budget",
    "num_generations": "sampling.thoughts",
    "group_size": "sampling.thoughts",
    "num_thoughts": "sampling.thoughts",
    "max_completion_length": "sampling.max_thought_tokens",
    "max_new_tokens": "sampling.max_thought_tokens",
    "max_tokens": "sampling.max_thought_tokens",
    "max_thought_length": "sampling.max_thought_tokens",
    "max_seq_length": "data.max_length",
    "max_seq_len": "data.max_length",
    "block_size": "data.max_length",
    "dataset": "data.path",
    "dataset_name": "data.path",
    "train_file": "data.path",
    "text_column": "data.column",
    "dataset_text_field": "data.column",
    "model_name": "model.path",
    "model_name_or_path": "model.path",
    "model_id": "model.path",
    "torch_dtype": "model.dtype",
    "precision": "model.dtype",
    "bf16": "policy.autocast",
    "num_train_epochs": "epochs",
    "num_epochs": "epochs",
    "steps": "max_steps",
    "num_steps": "max_steps",
    "total_steps": "max_steps",
    "max_train_steps": "max_steps",
    "logging_steps": "log_every",
    "save_steps": "checkpoint.every",
    "save_total_limit": "checkpoint.keep",
    "eval_steps": "eval.every",
    "num_iterations": "loss.inner_epochs",
    "ppo_epochs": "loss.inner_epochs",
    "epsilon": "loss.clip_low",
    "epsilon_high": "loss.clip_high",
    "clip_range": "loss.clip_low",
    "output": "output_dir",
    "out": "output_dir",
    "random_seed": "seed",
    "use_vllm": "engine.name",
    "vllm_server_base_url": "engine.urls",
    "lora_r": "policy.lora.r",
    "lora_alpha": "policy.lora.alpha",
    "lora_target_modules": "policy.lora.target_modules",
    "deepspeed": "policy.deepspeed_config",
    "use_peft": "policy.lora",
    "early_stopping_patience": "stop.patience",
    "wandb": "report_to",
}
"""From names in other trainers to our fields."""


def hint(name: str, known: Sequence[str], everywhere: Sequence[str] = ()) -> str:
    """Return a hint for an unknown `name`, for the end of a message.

    `known` are the names that are accepted at its place; `everywhere` are the dotted names of all fields.
    """
    if (alias := ALIASES.get(name)) in everywhere:
        return f"here it is '{alias}'"
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return f"did you mean '{near[0]}'?"
    same = [path for path in everywhere if path.rpartition(".")[2] == name]
    if same:
        return f"did you mean {' or '.join(repr(path) for path in same)}?"
    by_last_part = {path.rpartition(".")[2]: path for path in reversed(everywhere)}
    if near := difflib.get_close_matches(name, by_last_part, n=1, cutoff=0.7):  # most fields are far away
        return f"did you mean '{by_last_part[near[0]]}'?"
    return f"known here: {', '.join(known) or 'no fields'}"


def dotted(owner: type, prefix: str = "") -> Iterator[str]:
    """Every field of a dataclass and of the sections in it."""
    hints = field_types(owner)
    for name in names(owner):
        yield f"{prefix}{name}"
        kind = inner(hints[name])
        if is_dataclass(kind):
            yield from dotted(kind, f"{prefix}{name}.")  # type: ignore[arg-type]


def names(owner: Any) -> list[str]:
    """The fields of a dataclass, those of all its variants included."""
    if not is_dataclass(owner):
        return []
    return list(dict.fromkeys(field.name for kind in kinds(owner) for field in fields(kind)))


def field_types(owner: Any) -> dict[str, Any]:
    """The types of these fields, by name."""
    return {
        name: hint for kind in reversed(kinds(owner)) for name, hint in typing.get_type_hints(kind).items()
    }


def kinds(owner: Any) -> list[type]:
    """The classes that a section of type `owner` may have, itself first."""
    if isinstance(owner, type) and issubclass(owner, Varied):
        return [owner, *owner.variants().values()]
    return [owner]


def inner(kind: Any) -> Any:
    """Return X for `X | None`, and any other type as it is."""
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        return next(option for option in typing.get_args(kind) if option is not type(None))
    return kind


def item_of(kind: Any) -> type | None:
    """Return the section X for `dict[str, X]`, None for any other type."""
    arguments = typing.get_args(kind) if typing.get_origin(kind) is dict else ()
    return arguments[1] if arguments and is_dataclass(arguments[1]) else None  # type: ignore[return-value]


def owner_at(owner: Any, path: Sequence[Any]) -> Any:
    """Return the dataclass of the section at `path`."""
    for part in path:
        if typing.get_origin(owner) is dict:
            owner = typing.get_args(owner)[1]
        elif is_dataclass(owner):
            owner = inner(field_types(owner).get(part, owner))
    return owner
