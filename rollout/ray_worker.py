"""What runs in a Ray actor: one engine of this package, with weights from Ray's object store."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from rollout.engine import CachingEngine, Engine
from rollout.types import Prompt, SamplingParams, Thought


@dataclass(frozen=True)
class WorkerInfo:
    """What the pool must know of an actor's engine."""

    block_size: int
    max_model_len: int
    pid: int


class Worker:
    """One engine. `kind` is hf or vllm_local; `settings` are its arguments, `model` a hub id or folder."""

    def __init__(self, kind: str, settings: Mapping[str, Any], environment: Mapping[str, str]):
        os.environ.update(environment)  # before vLLM is imported
        self.held: list[Any] = []  # a reference to the weights it has
        self.lock = threading.Lock()
        self.engine = _hf(settings) if kind == "hf" else _vllm(settings)

    def info(self) -> WorkerInfo:
        """The limits of the engine."""
        info = self.engine.info
        if info.max_model_len is not None:
            return WorkerInfo(info.block_size or 1, info.max_model_len, os.getpid())
        config = cast(Any, info.module).config
        return WorkerInfo(1, getattr(config, "max_position_embeddings", 1 << 20), os.getpid())

    def sample(
        self,
        prompts: list[Prompt],
        params: SamplingParams,
        n: int,
        seeds: list[int],
        weights: list[Any],
        version: int,
    ) -> tuple[list[list[Thought]], bool]:
        """The thoughts, and whether weights had to be loaded first.

        Newer weights than `version` are fine: thoughts carry their own version.
        """
        with self.lock:
            is_behind = self.engine.version < version
            if is_behind:
                self._load(weights, version)
        return asyncio.run(self.engine.sample(prompts, params, n, seeds)), is_behind

    def sync(self, weights: list[Any], version: int) -> None:
        """Load weights."""
        with self.lock:
            self._load(weights, version)

    def _load(self, weights: list[Any], version: int) -> None:
        import ray

        if not weights:
            raise RuntimeError("this pool was given no weights yet: call sync first")
        stored = cast(dict[str, Any], ray.get(weights[0]))
        own = {name: tensor.clone() for name, tensor in stored.items()}  # the object store's are read-only
        self.engine.sync(lambda: own.items(), version)
        self.held = weights

    def weights(self) -> tuple[list[Any], int]:
        """A reference to the weights it has, and their version."""
        return self.held, self.engine.version

    def reset_prefix_cache(self) -> None:
        """Empty the prefix cache, if there is one."""
        if self.engine.info.block_size is not None:
            cast(CachingEngine, self.engine).reset_prefix_cache()

    def health(self) -> dict[str, Any]:
        """The engine's."""
        return self.engine.health()


def _hf(settings: Mapping[str, Any]) -> Engine:
    """A transformers engine of version -1, so that it loads weights before it samples."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rollout.hf import HFEngine

    source = {key: settings[key] for key in ("revision", "trust_remote_code") if key in settings}
    form = {key: settings[key] for key in ("dtype", "attn_implementation") if key in settings}
    options = {key: settings[key] for key in ("batch_size",) if key in settings}
    model: Any = AutoModelForCausalLM.from_pretrained(
        settings["model"], **{"dtype": "float32"} | form | source
    )
    tokenizer = None
    if settings.get("tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(settings["tokenizer"], **source)
    model = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")  # tested on CPUs: docs/gpu.md
    return HFEngine(model, tokenizer=tokenizer, shares_weights=False, version=-1, **options)


def _vllm(settings: Mapping[str, Any]) -> Engine:
    """A vLLM engine, likewise."""
    from rollout.vllm_local import VLLMEngine

    return VLLMEngine(**settings, version=-1)
