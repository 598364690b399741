"""Weights on their way into an engine: copied in memory, checked for completeness, written and read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from rollout.folders import begin_folder, finish_folder, follow_umask
from rollout.types import WeightSource


def copy_weights(model: nn.Module, weights: WeightSource) -> None:
    """Copy the tensors of a weight source into the parameters and persistent buffers of the same names.

    Each is cast to the type and device of its parameter. Every parameter must come under at least one of its
    names (tied weights have several). Raises ValueError, naming the parameters, for unknown names, other
    shapes and missing parameters; tensors that came before the error have then been copied.
    """
    own = dict(model.named_parameters(remove_duplicate=False))
    persistent = model.state_dict().keys()
    buffers = dict(model.named_buffers(remove_duplicate=False))
    accepted = own | {name: buffer for name, buffer in buffers.items() if name in persistent}
    given: set[int] = set()
    unknown: list[str] = []
    with torch.no_grad():
        for name, tensor in weights():
            if name not in accepted:
                unknown.append(name)
                continue
            own_tensor = accepted[name]
            if own_tensor.shape != tensor.shape:
                raise ValueError(
                    f"{name}: got shape {tuple(tensor.shape)}, the engine has {tuple(own_tensor.shape)}"
                )
            own_tensor.copy_(tensor)
            given.add(id(own_tensor))
    missing = [name for name, parameter in own.items() if id(parameter) not in given]
    if unknown or missing:
        raise ValueError(does_not_fit({"unknown": unknown, "missing": missing}))


class Parameter(NamedTuple):
    """A parameter of a checkpoint: its names, several if it is tied, and its shape."""

    names: tuple[str, ...]
    shape: torch.Size


def parameters_of(model: str | Path, **where: Any) -> list[Parameter]:
    """The parameters of a checkpoint by transformers' names; no weights are read.

    `where` goes to transformers' `from_pretrained` (revision, trust_remote_code).
    """
    config = AutoConfig.from_pretrained(model, **where)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(
            config, trust_remote_code=where.get("trust_remote_code", False)
        )
    found: dict[int, tuple[list[str], torch.Size]] = {}
    for name, parameter in empty.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), ([], parameter.shape))[0].append(name)
    return [Parameter(tuple(names), shape) for names, shape in found.values()]


def complete(state: Mapping[str, torch.Tensor], parameters: Sequence[Parameter]) -> dict[str, torch.Tensor]:
    """`state` with every tied weight under all its names.

    Engines that pack their weights keep a copy of a tied head. It becomes stale without an error if the
    head's name is missing, and neither safetensors files nor `named_parameters()` have that name. Raises
    ValueError for tensors that are missing, unknown, of another shape or not floating point.
    """
    shapes = {name: p.shape for p in parameters for name in p.names}
    wrong = {
        "missing": [p.names[0] for p in parameters if not any(name in state for name in p.names)],
        "unknown": [name for name in state if name not in shapes],
        "of another shape": [
            f"{n} is {tuple(t.shape)}, not {tuple(shapes[n])}"
            for n, t in state.items()
            if n in shapes and t.shape != shapes[n]
        ],
        "not floating point": [n for n, t in state.items() if not t.is_floating_point()],
    }
    if any(wrong.values()):
        raise ValueError(does_not_fit(wrong))
    whole = {}
    for p in parameters:
        tensor = next(state[name] for name in p.names if name in state)
        whole |= {name: state.get(name, tensor) for name in p.names}
    return whole


def does_not_fit(wrong: Mapping[str, Sequence[str]]) -> str:
    """An error message about weights: the first few names of each kind."""
    parts = []
    for kind, names in wrong.items():
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        if names:
            parts.append(f"{kind}: {', '.join(names[:5])}{more}")
    return "the weights do not fit the engine's model; " + "; ".join(parts)


def write_weights(
    folder: Path, state: Mapping[str, torch.Tensor], notes: Mapping[str, str] | None = None
) -> None:
    """Write `folder`/model.safetensors aside, then rename; tied weights stand under all their names.

    `notes` go into the file's metadata, for `notes_of`.
    """
    from safetensors.torch import save_file

    work = begin_folder(folder)
    seen: set[int] = set()
    whole = {}
    for name, tensor in state.items():  # the file format does not allow shared memory
        whole[name] = tensor.clone() if tensor.data_ptr() in seen else tensor.contiguous()
        seen.add(tensor.data_ptr())
    save_file(whole, work / "model.safetensors", metadata={"format": "pt", **(notes or {})})
    finish_folder(work, folder)


def notes_of(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file, or of the first in a folder; empty if there is none to read."""
    from safetensors import SafetensorError, safe_open

    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    try:
        with safe_open(files[0], "pt") as file:
            return file.metadata() or {}
    except (IndexError, OSError, SafetensorError):
        return {}


def write_adapter(folder: Path, state: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> None:
    """Write a LoRA adapter in PEFT's format."""
    from safetensors.torch import save_file

    save_file(
        {n: t.contiguous() for n, t in state.items()},
        folder / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    (folder / "adapter_config.json").write_text(json.dumps(dict(config)))
    follow_umask(folder)


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file, or of all such files in a folder.

    Raises ValueError for an unreadable file; the message has none of its content.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{path.name} holds no .safetensors file")
    state: dict[str, torch.Tensor] = {}
    for file in files:
        try:
            state |= load_file(file)
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{file.name} is not a readable safetensors file ({type(error).__name__})"
            ) from None
    return state
