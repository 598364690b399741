"""From a configuration to the engine that samples its thoughts, and the probe that checks its weights."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import nn

from rlpretrain import models
from rlpretrain.config import ConfigError, EngineConfig, PretrainConfig
from rlpretrain.config.plugins import find
from rlpretrain.models.adapters import plain_copy
from rlpretrain.models.lengths import limit_of
from rlpretrain.models.saving import save_start
from rlpretrain.objectives import Objective, delimiters
from rlpretrain.ranks import Ranks
from rlpretrain.scoring.packing import Layout, count, pack
from rlpretrain.types import Batch, Document
from rollout.blocking import wait_for_result
from rollout.engine import Engine, SleepingEngine
from rollout.hf import HFEngine
from rollout.idle import IdleEngine
from rollout.probe import Probe
from rollout.types import Group, Position

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class EngineContext:
    """What an engine is made from: the only argument of the class or function that `engine.name` names.

    The engine begins with the run's starting weights; `sync` is called before the first thought is sampled.
    """

    config: PretrainConfig
    model: nn.Module
    """The trained model, on its device."""
    tokenizer: Any
    objective: Objective
    ranks: Ranks
    shares_weights: bool
    """`model` holds whole weights on every rank, so an engine may sample with it."""
    start: Path | None
    """Folder with the starting model and tokenizer, where `config.model.path` does not hold them."""
    frozen: bool = False
    """The weights never change: a built-in engine is not synced."""

    @property
    def settings(self) -> EngineConfig:
        """The `engine` section."""
        return self.config.engine

    @property
    def lead(self) -> bool:
        """Whether this rank hands weights to engines that all ranks share."""
        return self.ranks.first

    def share(self, value: T) -> T:
        """Rank 0's value, on every rank; all ranks call it."""
        return self.ranks.gather(value)[0]

    def say(self, text: str) -> None:
        """Print a line about a wait, on rank 0."""
        if self.lead:
            print(text, file=sys.stderr, flush=True)

    def checkpoint(self) -> dict[str, Any]:
        """`model` and `tokenizer` to load from disk or hub, with `revision` and `trust_remote_code`.

        Folders are absolute paths, since engines elsewhere have another working folder.
        """
        if self.start:
            return {"model": str(self.start.resolve()), "tokenizer": str(self.start.resolve())}
        settings = self.config.model
        paths = {"model": settings.path, "tokenizer": settings.tokenizer or settings.path}
        absolute = {
            key: str(Path(path).resolve()) if Path(path).exists() else path for key, path in paths.items()
        }
        return absolute | {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code}

    def max_model_len(self, wanted: int | None = None) -> int:
        """`wanted` positions, by default those that contexts, thoughts and the probe need.

        Raises ConfigError if `wanted` is more than the model takes.
        """
        limit = limit_of(self.model)
        if limit and wanted and wanted > limit.tokens:
            raise ConfigError(
                f"engine.max_model_len is {wanted}, but {limit.reason}: set it to at most {limit.tokens}"
            )
        return wanted or longest(self.config, self.objective, limit.tokens if limit else None)

    def sampling_module(self) -> tuple[nn.Module, bool]:
        """A transformers module with whole weights, and whether it is the trained one.

        It is a copy where the trained one is sharded, or changes while thoughts are sampled.
        """
        if not self.shares_weights:
            copy = models.load_with_tokenizer(
                self.config.model, delimiters(self.config.objective), self.config.seed
            )[0]
            return copy.to(self.ranks.device), False
        if self.settings.max_staleness:
            return plain_copy(self.model), False
        return self.model, True


def make_engine(
    config: PretrainConfig,
    model: nn.Module,
    tokenizer: Any,
    objective: Objective,
    ranks: Ranks,
    *,
    shares: bool,
    start: Path | None = None,
    frozen: bool = False,
) -> Engine:
    """The engine that `engine.name` names, with the run's starting weights.

    The arguments are those of EngineContext. Raises ConfigError or ImportError for settings that cannot work.
    """
    context = EngineContext(
        config=config,
        model=model,
        tokenizer=tokenizer,
        objective=objective,
        ranks=ranks,
        shares_weights=shares,
        start=start,
        frozen=frozen,
    )
    make = find_engine(config.engine)
    if not objective.has_positions and not shares:
        return IdleEngine()  # a copy of the whole weights would serve nobody
    if not objective.has_positions:  # nothing is ever sampled
        module, shared = context.sampling_module()
        return HFEngine(
            module, tokenizer=tokenizer, shares_weights=shared, batch_size=config.engine.batch_size
        )
    engine = make(context)
    if engine.info.can_sleep and config.engine.max_staleness:
        engine.close()
        raise ConfigError(
            f"engine {config.engine.name} sleeps while the model trains: set engine.max_staleness to 0"
        )
    return engine


def find_engine(settings: EngineConfig) -> Callable[[EngineContext], Engine]:
    """What makes the engine of a section; ConfigError if it cannot be imported."""
    return find(settings.factory or settings.name, "engine.name")


def sleep(engine: Engine) -> None:
    """Let an engine that can sleep give its device memory back while the model trains."""
    if engine.info.can_sleep:
        cast(SleepingEngine, engine).sleep()


def wake(engine: Engine) -> None:
    """Let an engine that can sleep take its memory again, before it gets new weights."""
    if engine.info.can_sleep:
        cast(SleepingEngine, engine).wake()


def write_start(
    config: PretrainConfig, model: nn.Module, tokenizer: Any, ranks: Ranks, changed: bool
) -> Path | None:
    """Write the starting model to `output_dir`/start, if the engine loads it from disk and it is `changed`.

    It is changed if tags were added or the weights are from scratch: `model.path` then holds another model.
    All ranks call it, before anything shards the model.
    """
    if not config.engine.loads_from_disk or not changed:
        return None
    start = Path(config.output_dir) / "start"
    if ranks.first:
        save_start(model, tokenizer, start)
    ranks.barrier()
    return start


def longest(config: PretrainConfig, objective: Objective, most: int | None) -> int:
    """Positions for the longest prompt and thought, and for the probe; at most `most`, the model's own."""
    wanted = max(objective.window(config.data.longest).sampled, 512)
    return min(wanted, most or wanted)


def default_tolerance(config: PretrainConfig, device: torch.device) -> float:
    """The largest difference in nats that the probe allows where `engine.probe_tolerance` is not set.

    In float32 on an H100, vLLM's log-probs of a tiny model were up to .01 nats off the trainer's on a CPU.
    SmolLM2-135M in bfloat16 was up to .28 nats off itself in float32, in 72 probes on a CPU.
    """
    if (config.engine.dtype or config.model.dtype) != "float32" or config.model.dtype != "float32":
        return 0.5
    return 1e-3 if device.type == "cpu" else 0.05


class SyncProbe:
    """After each sync a few tokens of the engine, scored by the policy; see `rollout.probe.Probe`.

    `seconds` and `difference` are those of the last probe.
    """

    def __init__(self, config: PretrainConfig, engine: Engine, policy: Any, vocabulary: int):
        tolerance, device = config.engine.probe_tolerance, next(policy.model.parameters()).device
        info = engine.info
        self.engine, self.policy = engine, policy
        self.probe = Probe(
            vocabulary,
            info.block_size or 1,
            info.max_model_len or _positions_of(policy.model),
            temperature=config.sampling.temperature or 1.0,
            tolerance=default_tolerance(config, device) if tolerance is None else tolerance,
        )
        self.seconds, self.difference = 0.0, 0.0

    @torch.no_grad()
    def __call__(self, version: int) -> None:
        """Raises StaleWeights where engine and policy differ."""
        begin = time.perf_counter()
        thoughts = wait_for_result(self.probe.ask(self.engine))
        ids = self.probe.prompt.token_ids
        group = Group(
            "probe", Position("probe", len(ids), ids, (ids[0],)), self.probe.prompt, tuple(thoughts), version
        )
        batch = Batch((group,), (Document("probe", (*ids, ids[0])),))
        layout = Layout(1 << 30, cut="force_close")  # one micro-batch, however many thoughts
        (micro,) = pack(batch, layout, count(batch, layout.cut))
        scored = self.policy.score(micro).thought_logps[0].tolist()
        logps = [row[: len(t.token_ids)] for row, t in zip(scored, thoughts, strict=True)]
        self.difference = wait_for_result(self.probe.verify(self.engine, thoughts, logps, version))
        self.seconds = time.perf_counter() - begin


def _positions_of(model: nn.Module) -> int:
    """The positions of a model; where it has no limit, more than any probe needs."""
    limit = limit_of(model)
    return limit.tokens if limit else 1 << 20
