"""The only module that uses private or unstable names of other libraries."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.utils import logging as hf_logging

from rewards.fused_tiles import allow_compilations
from rlpretrain.floors import refuse_older
from rlpretrain.floors import versions as versions
from rollout.weights import complete, parameters_of

refuse_older()  # everything that computes imports this module

INSTALL = {
    name: f'pip install "rlpretrain[{name}]"'
    for name in ("deepspeed", "vllm", "ray", "trl", "peft", "qlora", "eval")
}


@dataclass(frozen=True, slots=True)
class Head:
    """A language-model head: logits = scale * cap(hidden @ weight.T + bias).

    cap(x) = softcap * tanh(x / softcap), or x if softcap is None.
    """

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    scale: float


@contextmanager
def without_notices() -> Iterator[None]:
    """Silence transformers' log messages, except errors."""
    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Hide transformers' progress bars, which would interrupt ours."""
    enabled = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            hf_logging.enable_progress_bar()


def require_library(library: str, extra: str, reason: str) -> None:
    """Raise ImportError with the reason and the install line if a library is not installed."""
    if importlib.util.find_spec(library) is None:
        raise ImportError(f"{reason}: {INSTALL[extra]}")


def compile_call(layer: nn.Module, backend: str, prepare: Callable[[Any], None]) -> None:
    """Compile calls of a layer that have no cache of keys and values; `prepare` gets their arguments.

    The compiled call is where torch keeps it, so that copies of the layer have none. A cache is known by its
    class, since its argument is past_key_values, layer_past or cache_params, in GPT-2 without a name.
    """
    layer.compile(backend=backend)
    compiled, plain = layer._compiled_call_impl, layer._call_impl
    assert compiled is not None, "torch has just set it"

    def call(*args: Any, **kwargs: Any) -> Any:
        if any(isinstance(x, Cache) for x in (*args, *kwargs.values())):
            return plain(*args, **kwargs)
        prepare((args, kwargs))
        allow_compilations()
        return compiled(*args, **kwargs)

    layer._compiled_call_impl = call


def fill_vocabulary(tokenizer: Any) -> None:
    """Give every unused id below the largest one a token that does not occur in text (fast tokenizers).

    A tokenizer (tokenizers 0.23) gives a new token the number of its tokens as id. With unused ids below,
    that id belongs to another token.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return
    state = json.loads(backend.to_str())
    vocabulary = state.get("model", {}).get("vocab")
    if not isinstance(vocabulary, dict):  # a list has no unused ids
        return
    holes = sorted(set(range(max(vocabulary.values()) + 1)) - set(vocabulary.values()))
    if not holes:
        return
    by_id = {token["id"]: token["content"] for token in state["added_tokens"]}
    vocabulary.update({by_id.get(i, f"<unused_{i}>"): i for i in holes})
    tokenizer._tokenizer = backend.from_str(json.dumps(state))


def head_of(model: nn.Module) -> Head:
    """Return the head of a Hugging Face causal LM, with what its family does to logits (Gemma, Cohere, ...).

    The start of every run compares this head with the model's own forward (`scoring.check_head`). So a model
    that does more to its logits is refused, not scored wrongly.
    """
    causal: Any = model
    layer = causal.get_output_embeddings()
    if layer is None:
        raise ValueError(
            f"{type(model).__name__} has no output embeddings: a causal language model is needed"
        )
    config = text_config_of(model)
    logit_scale = float(getattr(config, "logit_scale", None) or 1.0)
    scale = logit_scale / float(getattr(config, "logits_scaling", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    trained_rows = getattr(layer, "token_adapter", None)  # PEFT's trained rows of a table
    if trained_rows is None or trained_rows.disable_adapters:
        weight = layer.weight
    else:
        weight = trained_rows.get_merged_weights(trained_rows.active_adapters)
    return Head(weight, getattr(layer, "bias", None), float(softcap) if softcap else None, scale)


def backbone_of(model: nn.Module) -> nn.Module:
    """Return the part of a causal LM that computes the final hidden states."""
    causal: Any = model
    backbone = causal.base_model
    if backbone is model:  # Llama 4's text model has another prefix than its class says
        backbone = getattr(causal, "model", model)
    if backbone is model:
        raise ValueError(
            f"{type(model).__name__} has no separate backbone (base_model_prefix): cannot score it"
        )
    return backbone


def embedding_weight_of(model: nn.Module) -> Tensor:
    """Return the table of input embeddings, [rows, H]."""
    causal: Any = model
    return causal.get_input_embeddings().weight


def text_config_of(model: nn.Module) -> Any:
    """Return the configuration of a model's language part: of a text model, the whole configuration."""
    config: Any = model.config
    return config.get_text_config()


def attention_of(model: nn.Module) -> str:
    """Return the current attention implementation of a model, as `set_attn_implementation` takes it."""
    config: Any = model.config
    return config._attn_implementation


def forward_of(model: nn.Module) -> Any:
    """Return the model's forward without the autocast that accelerate puts around it.

    We call the parts of the model without that autocast too.
    """
    return getattr(model, "_original_forward", model)


def keep_differentiable(model: nn.Module) -> None:
    """Keep bitsandbytes' four-bit layers in the form that has a gradient.

    On a CPU with AVX512-BF16, bitsandbytes (0.50) converts them to an inference form at the first forward in
    evaluation mode, which for us is sampling. That form is permanent. It computes in bfloat16, passes no
    gradient to earlier layers, and gives wrong weights to code that dequantises it (for instance
    bitsandbytes#2078). Reading the state of a converted layer converts it back.
    """
    for module in model.modules():
        layer: Any = module
        if getattr(layer, "support_avx512bf16_for_cpu", False):
            layer.support_avx512bf16_for_cpu = False
            layer.state_dict()


def has_deepspeed() -> bool:
    """Return whether DeepSpeed is installed."""
    return importlib.util.find_spec("deepspeed") is not None


def import_deepspeed(on_cpu: bool):
    """Import deepspeed for the given accelerator.

    On a CPU, without the op that DeepSpeed would compile at first use, which takes a minute.
    """
    require_library("deepspeed", "deepspeed", "policy.backend deepspeed needs DeepSpeed")
    os.environ.setdefault("DS_LOG_LEVEL", "ERROR")
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import logging

    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    if on_cpu:  # private name: shared-memory collectives, which speed up gloo and need a compiler
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def gathered(parameters: Iterable[nn.Parameter]) -> AbstractContextManager[object]:
    """Gather those of the parameters that ZeRO-3 has sharded, for the duration of the context."""
    sharded = [p for p in parameters if hasattr(p, "ds_id")]
    if not sharded:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(sharded)


def set_root(model: nn.Module, root: nn.Module) -> None:
    """Remember the module that FSDP 2 gathers with the parts of `model` outside its layers.

    It prepares it too, so that a forward of a layer alone does not make that layer the root.
    """
    sharded_model: Any = model
    sharded_model._rlpretrain_root = weakref.ref(root)
    sharded_root: Any = root
    sharded_root._get_fsdp_state()._lazy_init()


@contextmanager
def gathered_root(model: nn.Module) -> Iterator[None]:
    """Gather what FSDP 2 keeps outside the layers of `model`: embedding, last norm and head.

    For forwards without gradient that do not go through the module that FSDP 2 gathers.
    """
    own_root = getattr(model, "_rlpretrain_root", None)
    root: Any = own_root() if own_root is not None else model
    if not hasattr(root, "unshard"):
        yield
        return
    root._get_fsdp_state()._lazy_init()
    root.unshard()
    try:
        yield
    finally:
        root.reshard()


def shard_of(parameter: Any) -> Tensor:
    """Return this rank's shard of a parameter under ZeRO-3, flat and padded at the end.

    Frees the whole parameter first if it is gathered: it would hide a change of the shard.
    """
    parameter.partition()
    return parameter.ds_tensor.detach()


def sharded(model: nn.Module) -> bool:
    """Return whether this rank holds only a part of some parameter (ZeRO-3 or FSDP)."""
    from torch.distributed.tensor import DTensor

    return any(
        hasattr(p, "ds_id") or isinstance(p, DTensor) or hasattr(p, "_is_flat_param")
        for p in model.parameters()
    )


def trl_vllm_on_cpu() -> bool:
    """Make `use_vllm` with `vllm_mode="colocate"` of TRL's trainers work on a CPU; return whether it does.

    TRL (1.16) passes weights to `load_weights`, which fails on the CPU build of vLLM because its layers are
    packed, and leaves tied heads to vLLM. Here weights go through `reload_weights`, each tied weight under
    all its names. vLLM also runs in the trainer's precision, without compilation, without chunked prefill (as
    in rollout/vllm_local.py), in the trainer's process, and with half a GiB for keys and values (or
    VLLM_CPU_KVCACHE_SPACE, in GiB). Nothing is changed on a machine with an accelerator.

    Raises ImportError with the names of what an upgrade of TRL moved.
    """
    if torch.accelerator.is_available() or importlib.util.find_spec("trl") is None:
        return False
    generation: Any = importlib.import_module("trl.generation.vllm_generation")
    if not hasattr(generation, "LLM"):  # no vLLM: TRL reports that
        return False
    owner = generation.VLLMGeneration
    needed = ("_init_vllm", "sync_weights", "_iter_named_params")
    missing = [name for name in needed if not callable(getattr(owner, name, None))]
    if missing:
        raise ImportError(
            f"TRL {importlib.metadata.version('trl')} moved VLLMGeneration's {', '.join(missing)}: its vLLM "
            "cannot be made to work on a CPU; use rlpretrain.trl.rollout.Rollouts or TRL 1.16"
        )
    if hasattr(owner, "on_accelerators"):
        return True
    original_init, original_sync, original_llm = owner._init_vllm, owner.sync_weights, generation.LLM

    def init_vllm(self: Any) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        dtype = str(self.model.dtype).removeprefix("torch.")
        options = {"dtype": dtype, "enforce_eager": True, "enable_chunked_prefill": False, "block_size": 32}
        if "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
            options["kv_cache_memory_bytes"] = 2**29
        generation.LLM = partial(original_llm, **options)
        try:
            with torch.random.fork_rng(devices=[]):  # vLLM seeds the process in which it runs
                original_init(self)
        finally:
            generation.LLM = original_llm

    def sync_weights(self: Any) -> None:
        if self.mode != "colocate":
            return original_sync(self)
        state = {name: p.detach().clone() for name, p in self._iter_named_params()}
        names = parameters_of(self.model.name_or_path, trust_remote_code=self.trust_remote_code)
        weights = complete(state, names)
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights.items())})
        self.llm.reset_prefix_cache()

    owner._init_vllm, owner.sync_weights = init_vllm, sync_weights
    owner.on_accelerators = (original_init, original_sync)
    return True


def trainer_of(log_metric: object) -> Any:
    """Return the trainer that passes this `log_metric` to its reward functions, or None.

    TRL passes neither the model nor the trainer to reward functions (huggingface/trl#3928 asks for it), and
    its command line adds no callback. It does pass `log_metric`, which is documented and happens to be a
    method of the trainer.
    """
    from transformers import Trainer

    owner = getattr(log_metric, "__self__", None)
    return owner if isinstance(owner, Trainer) else None
