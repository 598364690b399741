"""The engines of this package: what each needs of a run's configuration.

`EngineConfig.factory` names these functions. Optional libraries are imported by the engine that uses them.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from rlpretrain.compat import attention_of, text_config_of
from rlpretrain.config import ConfigError
from rlpretrain.config.engines import (
    RayConfig,
    ServerConfig,
    SGLangServerConfig,
    VLLMConfig,
    VLLMLocalConfig,
    VLLMServerConfig,
)
from rlpretrain.models.adapters import adapter_config, has_lora
from rlpretrain.models.kernels import PREFIX
from rlpretrain.rollouts.engines import EngineContext
from rollout.engine import Engine
from rollout.hf import HFEngine


def make_hf(context: EngineContext) -> Engine:
    """Transformers in the training process."""
    module, shared = context.sampling_module()
    batch_size = context.settings.batch_size
    return HFEngine(module, tokenizer=context.tokenizer, shares_weights=shared, batch_size=batch_size)


def make_vllm_local(context: EngineContext) -> Engine:
    """vLLM in the training process, on one rank."""
    from rollout.vllm_local import VLLMEngine

    settings = context.settings
    assert isinstance(settings, VLLMLocalConfig)
    if settings.sleep and settings.max_staleness:
        raise ConfigError(
            "engine.sleep is for engine vllm_local with max_staleness 0: with more it samples while "
            "the model trains"
        )
    if context.ranks.size > 1:
        raise ConfigError(
            f"engine vllm_local trains on one rank, not {context.ranks.size}: use vllm_server, ray or hf"
        )
    return VLLMEngine(**_vllm(context, settings), sleep=settings.sleep)


def make_ray(context: EngineContext) -> Engine:
    """A pool of Ray actors; rank 0 hands them the weights."""
    from rollout.ray_pool import RayEngine

    settings = context.settings
    assert isinstance(settings, RayConfig)
    if settings.of == "vllm_local":
        worker = _vllm(context, settings)
    else:
        worker = context.checkpoint() | {
            "dtype": settings.dtype or context.config.model.dtype,
            "batch_size": settings.batch_size,
            "attn_implementation": attention_of(context.model).removeprefix(PREFIX),
        }
    folder = Path(context.config.output_dir).resolve()
    name = f"{folder}-{os.environ.get('MASTER_PORT', os.getpid())}"
    return RayEngine(
        settings.of,
        worker,
        num_engines=settings.num_engines,
        resources=settings.resources or None,
        strategy=settings.strategy,
        address=settings.address,
        request_timeout=settings.request_timeout,
        deadline=settings.deadline,
        lead=context.lead,
        share=context.share,
        say=context.say,
        name=name.replace("/", "_"),
    )


def make_vllm_server(context: EngineContext) -> Engine:
    """The client of vLLM servers; rank 0 hands them the weights."""
    from rollout.vllm_server import VLLMServerEngine

    settings = context.settings
    assert isinstance(settings, VLLMServerConfig)
    if settings.transfer == "nccl" and not torch.cuda.is_available():
        raise ConfigError("engine.transfer: nccl needs CUDA in the trainer; engine.transfer: file needs none")
    return VLLMServerEngine(
        **_servers(context, settings),
        block_size=settings.block_size,
        transfer=settings.transfer,
        in_flight=settings.updates == "in_flight",
        master_address=settings.master_address,
    )


def make_sglang_server(context: EngineContext) -> Engine:
    """The client of SGLang servers; rank 0 hands them the weights."""
    from rollout.sglang_server import SGLangServerEngine

    settings, sampling = context.settings, context.config.sampling
    assert isinstance(settings, SGLangServerConfig)
    for name, value, exact in (("top_p", sampling.top_p, 1), ("top_k", sampling.top_k, 0)):
        if value != exact:
            raise ConfigError(
                f"sampling.{name} is {value}, and SGLang gives log-probabilities before it truncates: set it "
                f"to {exact}, or use engine vllm_server"
            )
    return SGLangServerEngine(**_servers(context, settings), deterministic=settings.deterministic)


def _servers(context: EngineContext, settings: ServerConfig) -> dict[str, Any]:
    """The arguments of a ServerEngine."""
    if not settings.urls:
        raise ConfigError(f"engine {settings.name} needs engine.urls, the addresses of the servers")
    try:
        token = Path(settings.token_file).read_text().strip() if settings.token_file else None
    except OSError as error:
        raise ConfigError(f"engine.token_file {settings.token_file}: {error}") from None
    checkpoint = context.checkpoint()
    del checkpoint["tokenizer"]  # the servers have their own
    return checkpoint | {
        "urls": settings.urls,
        "weights_dir": settings.weights_dir or Path(context.config.output_dir) / "weights",
        "dtype": settings.dtype,
        "token": token,
        "concurrency": settings.concurrency,
        "request_timeout": settings.request_timeout,
        "deadline": settings.deadline,
        "lead": context.lead,
        "share": context.share,
        "vocabulary": text_config_of(context.model).vocab_size,
        "frozen": context.frozen,
        "say": context.say,
    }


def _vllm(context: EngineContext, settings: VLLMConfig) -> dict[str, Any]:
    """The arguments of a VLLMEngine."""
    config = context.config
    lora = config.policy.lora
    adapter = has_lora(context.model) and lora is not None and lora.sync == "adapter"
    return context.checkpoint() | {
        "dtype": settings.dtype or config.model.dtype,
        "max_model_len": context.max_model_len(settings.max_model_len),
        "max_num_seqs": settings.batch_size,
        "kv_cache_gib": settings.kv_cache_gib,
        "gpu_memory_utilization": settings.gpu_memory_utilization,
        "block_size": settings.block_size,
        "seed": config.seed,
        "options": settings.options,
        "lora": adapter_config(context.model) if adapter else None,
    }
