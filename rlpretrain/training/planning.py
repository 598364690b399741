"""Checks before the model is loaded: settings that cannot work, and the length of a run."""

from __future__ import annotations

import math

import torch

from rlpretrain.config import ConfigError, PretrainConfig
from rlpretrain.config.data import first_without_weight
from rlpretrain.data.document_source import DocumentSource, count_documents
from rlpretrain.evaluation import harness
from rlpretrain.evaluation.places import held_out_data
from rlpretrain.models import adapters, compilation
from rlpretrain.objectives import Objective, parse_section
from rlpretrain.rollouts.engines import find_engine
from rlpretrain.rollouts.replay import ReplaySource
from rlpretrain.training.averaging import check_average
from rlpretrain.training.backends import backend_of, find_backend
from rlpretrain.training.backends.deepspeed import ds_settings
from rlpretrain.training.backends.fsdp import check_replicas
from rlpretrain.training.learner import check_learner
from rlpretrain.training.losses import make_losses
from rlpretrain.training.mixing import check_mixing
from rlpretrain.training.optim import check_optimizer
from rlpretrain.training.schedules import make_schedule


def check_settings(config: PretrainConfig, owner: type[Objective], ranks: int) -> None:
    """Check settings without a model, in a run and a dry run. Raises ConfigError that names the setting."""
    if config.positions_per_step % ranks:
        raise ConfigError(
            f"positions_per_step {config.positions_per_step} does not divide over {ranks} ranks"
        )
    check_cut(config, owner)
    check_baseline(config, owner)
    adapters.check(config)
    compilation.check(config, backend_of(config.policy))
    check_sources(config, owner)
    held_out_data(config)
    check_mixing(config, owner)
    find_engine(config.engine)
    find_backend(config.policy)
    stage, backend = 0, backend_of(config.policy)
    if backend == "deepspeed":
        settings = ds_settings(config.policy, config.optim, getattr(torch, config.model.dtype))
        stage = settings["zero_optimization"]["stage"]
    check_optimizer(config.optim, flat=stage > 0, split=backend == "fsdp")
    if backend == "fsdp":
        check_replicas(config.policy.fsdp, ranks)
        if config.model.quantization != "none":
            raise ConfigError(
                "model.quantization: FSDP cannot shard quantised weights; use torch or deepspeed"
            )
    if "learner" in owner.needs:
        check_learner(config, owner, 3 if backend == "fsdp" else stage)
    make_schedule(config.optim, total_steps=1)
    make_losses(config.loss.terms)
    if config.max_steps is not None:
        check_average(config.average, config.max_steps)
    if config.average and not hasattr(find_backend(config.policy), "parts"):
        raise ConfigError(f"average: policy.backend {config.policy.backend} has no method `parts`")
    if config.eval.tasks:
        harness.check_installed()


def check_cut(config: PretrainConfig, owner: type[Objective]) -> None:
    """What becomes of thoughts that did not close themselves must fit the objective."""
    cut, (_, own) = config.sampling.cut, parse_section(config.objective)
    if cut in owner.refused_cuts:
        raise ConfigError(
            f"sampling.cut {cut} does not fit objective {owner.__name__}: thoughts without an end count and "
            "may not be left out. Set force_close or penalise"
        )
    if cut == "penalise" and config.sampling.cut_penalty > 0 and getattr(own, "advantage", None) == "max_rl":
        raise ConfigError(
            "objective.advantage max_rl needs rewards of at least 0, but sampling.cut penalise makes some "
            "negative: set sampling.cut to force_close"
        )


def check_baseline(config: PretrainConfig, owner: type[Objective]) -> None:
    """The baseline's model must be one that can score what the objective asks of it."""
    name, refused = config.baseline.name, owner.refused_baselines
    if name in refused:
        allowed = [other for other in ("self", "frozen", "ema") if other not in refused]
        raise ConfigError(
            f"baseline.name {name} does not fit objective {owner.__name__}, whose rewards are scored by the "
            f"baseline's model. Set {' or '.join(allowed)}"
        )


def check_reference(config: PretrainConfig, objective: Objective) -> None:
    """Check that a reference model of its own serves the objective. Raises ConfigError."""
    if config.reference.path is None and "second_model" in objective.needs:
        raise ConfigError(
            f"objective {type(objective).__name__} needs a second model: set reference.path to a checkpoint "
            "with the vocabulary of 'model'"
        )
    if config.reference.path is not None and not {"reference", "teacher"} & objective.needs:
        raise ConfigError(
            f"'reference.path' is set, but objective {type(objective).__name__} uses no reference: leave it "
            "out, or choose another objective"
        )


def check_sources(config: PretrainConfig, owner: type[Objective]) -> None:
    """Check that the named sources serve the objective. Raises ConfigError that names the setting."""
    sources = config.data.sources
    if config.ntp_data is not None and config.ntp_data.sources:
        raise ConfigError("'ntp_data.sources': ntp_data is one source; name several in 'data.sources'")
    if not sources:
        return
    if config.ntp_data is not None:
        raise ConfigError("'ntp_data' stands beside 'data.sources': make it one of them, with use: read")
    if config.max_steps is None and config.replay is None:
        raise ConfigError("the sources of a mixture end at different times: give max_steps instead of epochs")
    if "ntp_data" in owner.needs and "share" in config.objective:
        raise ConfigError("'objective.share' stands beside 'data.sources', whose weights are in its place")
    thinking = [source for source in sources.values() if source.use == "think"]
    if owner.has_positions:
        if not thinking:
            raise ConfigError("all of 'data.sources' have use: read, so there is nowhere to think")
        if (place := first_without_weight(thinking)) is not None:
            raise ConfigError(
                f"the weights of the sources with use: think sum to 0 at progress {place:g}, but every step "
                "has positions_per_step positions"
            )
        if len(thinking) < len(sources) and config.loss.ntp_coef == 0 and not config.loss.terms:
            raise ConfigError(
                "'loss.ntp_coef' is 0, so the sources with use: read would teach nothing: raise it, or leave "
                "them out"
            )
    elif unread := [name for name, source in sources.items() if not source.next_token]:
        raise ConfigError(
            f"data.sources.{unread[0]}: next_token is false, and objective {owner.__name__} has no other loss"
        )


def count_steps(
    config: PretrainConfig, objective: Objective, stream: DocumentSource | None, replayed: ReplaySource | None
) -> int:
    """The number of steps of a run. Raises ConfigError where it cannot be known."""
    if replayed is not None:
        return replayed.planned
    if config.max_steps is not None:
        return config.max_steps
    assert stream is not None, "only a replay has no documents of its own"
    length = count_documents(stream)
    if length is None:
        raise ConfigError("a stream has no known length: give max_steps instead of epochs")
    positions = (config.epochs or 1.0) * length * _positions_per_document(objective)
    return max(1, math.ceil(positions / config.positions_per_step))


def _positions_per_document(objective: Objective) -> int:
    """The largest number of positions in one document."""
    return objective.config.positions_per_document if objective.has_positions else 1


def documents_repeat(
    config: PretrainConfig, objective: Objective, stream: DocumentSource | None, steps: int
) -> bool:
    """Whether documents will be drawn more than once."""
    length = None if stream is None else count_documents(stream)
    if length is None:
        return False
    return steps * config.positions_per_step / _positions_per_document(objective) > length
