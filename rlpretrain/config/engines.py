"""Sections `sampling` and `engine`: how thoughts are drawn, and by what."""

from __future__ import annotations

from dataclasses import field as _field
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field
from pydantic.dataclasses import dataclass

from rlpretrain.config.base import STRICT, Amount, Count, PathText
from rollout.types import sane_temperature


@dataclass(config=STRICT, kw_only=True)
class SamplingConfig:
    """How thoughts are drawn."""

    thoughts: int = 16
    """G, thoughts per position."""
    temperature: Annotated[float, AfterValidator(sane_temperature)] = 1.0
    """Sampling temperature, at least .01 (0: greedy); targets are always scored at 1."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus; below 1 the importance ratios are biased."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Keep only the k likeliest tokens; 0 keeps all."""
    max_thought_tokens: Count = 256
    """Longest thought, close tag included. A base that never saw the tags closes no thought at first, so at
    first every thought is this long. `recipe: paper` sets the paper's 2048.
    """
    cut: Literal["mask", "force_close", "penalise"] = "penalise"
    """A thought that did not close itself: counts nowhere (mask), is closed for it (force_close), or is
    closed for it and loses `cut_penalty` (penalise). Our choice: under `mask` a base that never saw the tags
    learns nothing (NOTES.md).
    """
    cut_penalty: float = 1.0
    """Nats taken from the reward of an unclosed thought under `cut: penalise`. Our choice."""


@dataclass(config=STRICT, kw_only=True)
class EngineConfig:
    """What samples the thoughts."""

    name: Literal["hf", "vllm_local", "vllm_server", "ray"] = "hf"
    """hf: transformers in the training process, sharing its weights. vllm_local: vLLM there. vllm_server:
    servers at `urls`. ray: `num_engines` of kind `of` as Ray actors.
    """
    batch_size: Count = 256
    """Most thoughts decoded at once."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """vLLM's precision; the model's by default."""
    max_model_len: Count | None = None
    """vLLM's longest context plus thought in tokens; by default documents, thoughts and template together."""
    kv_cache_gib: Annotated[float, Field(gt=0)] | None = 0.5
    """vLLM's key-value cache in GiB; null on a GPU leaves it to gpu_memory_utilization."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.3
    """Share of the device that vLLM may take where kv_cache_gib is null."""
    block_size: Count | None = None
    """Tokens per block of vLLM's prefix cache; its own choice on a GPU, 32 on a CPU."""
    sleep: bool = False
    """Let vLLM give its device memory back while the model trains (GPU)."""
    max_staleness: Annotated[int, Field(ge=0)] = 0
    """Steps that thoughts may be sampled ahead of the update that uses them; 0 is synchronous and
    deterministic.
    """
    in_flight: Count = 4
    """With max_staleness above 0, calls of the engine at a time; each samples a part of a step's
    positions.
    """
    probe_tolerance: Amount | None = None
    """Largest difference in nats between engine and trainer on the probe after a sync; by default .001, in
    half precision .1.
    """
    options: dict[str, Any] = _field(default_factory=dict)
    """Further arguments of vllm.LLM, as they are (vllm_local)."""
    num_engines: Count = 1
    """Actors of engine ray."""
    of: Literal["hf", "vllm_local"] = "vllm_local"
    """What runs in each of them."""
    resources: dict[str, float] = _field(default_factory=dict)
    """What each of them takes: num_cpus (1 by default), num_gpus."""
    strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """How Ray places them over machines."""
    address: str | None = None
    """Ray cluster to join (auto, or host:port); a local one is started by default."""
    urls: tuple[str, ...] = ()
    """The servers of vllm_server, as http://host:port."""
    weights_dir: PathText | None = None
    """Folder, shared with the servers, that weights pass through; output_dir/weights by default."""
    transfer: Literal["file", "nccl"] = "file"
    """How weights reach the servers: through weights_dir, or from GPU to GPU (started with
    --weight-transfer-config).
    """
    master_address: str | None = None
    """With nccl, the address at which the servers reach the trainer; this machine's name by default."""
    token_file: PathText | None = None
    """File with the servers' API key."""
    concurrency: Count = 64
    """Most prompts in flight at a server."""
    request_timeout: Annotated[float, Field(gt=0)] = 600.0
    """Seconds to wait for one answer of a server or actor; one that takes longer counts as hung."""
    deadline: Annotated[float, Field(gt=0)] = 600.0
    """Seconds without any server that works after which a run stops."""
