"""From a configuration to the engine that samples its thoughts, and the probe that watches its weights."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlpretrain.compat import attention_of
from rlpretrain.config import ConfigError, PretrainConfig
from rlpretrain.models.adapters import adapter_config, has_lora, plain_copy
from rlpretrain.models.kernels import PREFIX
from rlpretrain.models.lengths import limit_of
from rlpretrain.models.saving import save_start
from rlpretrain.objectives import Objective
from rlpretrain.ranks import Ranks
from rlpretrain.scoring.packing import Layout, count, pack
from rlpretrain.types import Batch, Document
from rollout.engine import Engine
from rollout.hf import HFEngine
from rollout.types import Group, Position
from rollout.weights import Probe


def make_engine(
    config: PretrainConfig,
    model: nn.Module,
    tokenizer: Any,
    objective: Objective,
    ranks: Ranks,
    *,
    shares: bool,
    start: Path | None = None,
) -> Engine:
    """The engine that `engine.name` names, with the run's starting weights.

    `shares`: the hf engine may read the model's own parameters. `start`: where an engine that loads from disk
    finds weights and tokenizer; the model's own path by default. Raises ConfigError or ImportError for what
    cannot work.
    """
    e = config.engine
    if e.sleep and (e.name != "vllm_local" or e.max_staleness):
        raise ConfigError(
            "engine.sleep is for engine vllm_local with max_staleness 0: only that rests while the model "
            "trains"
        )
    if e.name == "hf" or not objective.has_positions:  # without positions nothing is ever sampled
        if e.max_staleness and shares:  # sampling goes on while the trainer's parameters change
            model, shares = plain_copy(model), False
        return HFEngine(model, tokenizer=tokenizer, shares_weights=shares, batch_size=e.batch_size)
    if e.name == "vllm_server":
        return _servers(config, model, start, ranks)
    if e.name == "ray":
        return _pool(config, model, objective, start, ranks)
    if ranks.size > 1:
        raise ConfigError(
            f"engine vllm_local trains on one rank, not {ranks.size}: use vllm_server, ray or hf"
        )
    from rollout.vllm_local import VLLMEngine

    return VLLMEngine(**_vllm(config, model, objective, start))


def _where(config: PretrainConfig, start: Path | None) -> dict[str, Any]:
    """What an engine that loads from disk loads; folders as absolute paths, since actors have a working
    folder of their own.
    """
    m = config.model
    if start:
        return {"model": str(start.resolve()), "tokenizer": str(start.resolve())}
    paths = {"model": m.path, "tokenizer": m.tokenizer or m.path}
    found = {k: str(Path(p).resolve()) if Path(p).exists() else p for k, p in paths.items()}
    return found | {"revision": m.revision, "trust_remote_code": m.trust_remote_code}


def _vllm(
    config: PretrainConfig, model: nn.Module, objective: Objective, start: Path | None
) -> dict[str, Any]:
    """The arguments of a VLLMEngine."""
    e, limit = config.engine, limit_of(model)
    most = limit.tokens if limit else None
    if e.max_model_len and most and e.max_model_len > most:
        raise ConfigError(
            f"engine.max_model_len is {e.max_model_len}, but {limit.reason}: set it to at most {most}"
        )
    return _where(config, start) | {
        "dtype": e.dtype or config.model.dtype,
        "max_model_len": e.max_model_len or longest(config, objective, most),
        "max_num_seqs": e.batch_size,
        "kv_cache_gib": e.kv_cache_gib,
        "gpu_memory_utilization": e.gpu_memory_utilization,
        "block_size": e.block_size,
        "seed": config.seed,
        "options": e.options,
        "sleep": e.sleep,
        "lora": adapter_config(model) if has_lora(model) and config.policy.lora.sync == "adapter" else None,
    }


def _pool(
    config: PretrainConfig, model: nn.Module, objective: Objective, start: Path | None, ranks: Ranks
) -> Engine:
    """The pool of Ray actors; rank 0 hands them the weights."""
    from rollout.ray_pool import RayEngine

    e = config.engine
    kernel = attention_of(model).removeprefix(PREFIX)
    small = _where(config, start) | {"dtype": e.dtype or config.model.dtype, "batch_size": e.batch_size}
    small |= {"attn_implementation": kernel}
    name = f"{Path(config.output_dir).resolve()}-{os.environ.get('MASTER_PORT', os.getpid())}"
    return RayEngine(
        e.of,
        _vllm(config, model, objective, start) if e.of == "vllm_local" else small,
        num_engines=e.num_engines,
        resources=e.resources or None,
        strategy=e.strategy,
        address=e.address,
        request_timeout=e.request_timeout,
        deadline=e.deadline,
        lead=ranks.first,
        share=lambda value: ranks.gather(value)[0],
        name=name.replace("/", "_"),
    )


def _servers(config: PretrainConfig, model: nn.Module, start: Path | None, ranks: Ranks) -> Engine:
    """The client of vLLM servers; rank 0 hands them the weights."""
    from rollout.vllm_server import VLLMServerEngine

    e = config.engine
    if not e.urls:
        raise ConfigError("engine vllm_server needs engine.urls, the addresses of the servers")
    try:
        token = Path(e.token_file).read_text().strip() if e.token_file else None
    except OSError as error:
        raise ConfigError(f"engine.token_file {e.token_file}: {error}") from None
    if e.transfer == "nccl" and not torch.cuda.is_available():
        raise ConfigError("engine.transfer: nccl needs CUDA in the trainer; engine.transfer: file needs none")
    folder = Path(e.weights_dir) if e.weights_dir else Path(config.output_dir) / "weights"
    return VLLMServerEngine(
        e.urls,
        **{k: v for k, v in _where(config, start).items() if k != "tokenizer"},
        weights_dir=folder,
        token=token,
        concurrency=e.concurrency,
        transfer=e.transfer,
        master_address=e.master_address,
        request_timeout=e.request_timeout,
        deadline=e.deadline,
        block_size=e.block_size,
        lead=ranks.first,
        share=lambda value: ranks.gather(value)[0],
        vocabulary=model.config.get_text_config().vocab_size,
        say=_say if ranks.first else lambda text: None,
    )


def _say(text: str) -> None:
    """A line for whoever waits, beside what the run prints."""
    print(text, file=sys.stderr, flush=True)


def lie_down(config: PretrainConfig, engine: Any) -> None:
    """Let the engine give its device memory back while the model trains, where `engine.sleep` asks for it."""
    if config.engine.sleep:
        engine.sleep()


def wake_up(config: PretrainConfig, engine: Any) -> None:
    """Before new weights: the engine takes its memory again."""
    if config.engine.sleep:
        engine.wake()


def write_start(
    config: PretrainConfig, model: nn.Module, tokenizer: Any, ranks: Ranks, changed: bool
) -> Path | None:
    """`output_dir`/start with the starting model, where an engine needs it: it loads from disk, and the model
    is not (`changed`: tags were added, or the weights are from scratch) what its path holds. All ranks call
    it, before anything shards the model.
    """
    if config.engine.name == "hf" or not changed:
        return None
    start = Path(config.output_dir) / "start"
    if ranks.first:
        save_start(model, tokenizer, start)
    ranks.barrier()
    return start


def longest(config: PretrainConfig, objective: Objective, most: int | None) -> int:
    """The longest context with its thought and what is said after it; room for the probe, at most what the
    model takes.
    """
    wanted = max(objective.window(config.data.max_length).sampled, 512)
    return min(wanted, most or wanted)


class SyncProbe:
    """After each sync a few tokens of the engine, scored by the policy; see `rollout.weights.Probe`.

    Engines that read the trainer's own weights need none. `seconds` and `difference` are those of the last
    one.
    """

    def __init__(self, config: PretrainConfig, engine: Any, policy: Any, vocabulary: int):
        half = (config.engine.dtype or config.model.dtype) != "float32" or config.model.dtype != "float32"
        tolerance = config.engine.probe_tolerance
        self.engine, self.policy = engine, policy
        self.probe = Probe(
            vocabulary,
            engine.block_size,
            engine.max_model_len,
            temperature=config.sampling.temperature or 1.0,
            tolerance=tolerance if tolerance is not None else 0.1 if half else 1e-3,
        )
        self.seconds, self.difference = 0.0, 0.0

    @torch.no_grad()
    def __call__(self, version: int) -> None:
        """Raises StaleWeights where engine and policy differ."""
        begin = time.perf_counter()
        thoughts = asyncio.run(self.probe.ask(self.engine))
        ids = self.probe.prompt.token_ids
        group = Group(
            "probe", Position("probe", len(ids), ids, (ids[0],)), self.probe.prompt, tuple(thoughts), version
        )
        batch = Batch((group,), (Document("probe", (*ids, ids[0])),))
        layout = Layout(1 << 30, cut="force_close")  # one micro-batch, however many thoughts
        (micro,) = pack(batch, layout, count(batch, layout.cut))
        scored = self.policy.score(micro).thought_logps[0].tolist()
        logps = [row[: len(t.token_ids)] for row, t in zip(scored, thoughts, strict=True)]
        self.difference = asyncio.run(self.probe.verify(self.engine, thoughts, logps, version))
        self.seconds = time.perf_counter() - begin
