"""One objective, one file.

An objective is found by the name of its module here, or by `package.module:Class`.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlpretrain.config import ConfigError, PretrainConfig, names
from rlpretrain.config.io import parse
from rlpretrain.objectives.base import Objective
from rlpretrain.objectives.settings import NEEDS, Config, Setting
from rlpretrain.prompts import AddedTokens, Delimiters
from rollout.types import SamplingParams

__all__ = [
    "Config",
    "Objective",
    "Setting",
    "available",
    "banned_ids",
    "config_of",
    "delimiters",
    "find",
    "load_objective",
    "parse_section",
]


SHARED = {"advice", "base", "candidates", "designer", "learner", "sampling", "settings"}
"""Modules of this folder that are not objectives."""


def available() -> list[str]:
    """Names of the objectives that ship with the library."""
    modules = {module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)])}
    return sorted(modules - SHARED)


def find(name: str) -> type[Objective]:
    """The class of a module name or of a `package.module:Class` path.

    Raises ConfigError with the nearest name.
    """
    module, _, attribute = name.partition(":")
    if not attribute:
        if name not in available():
            near = difflib.get_close_matches(name, available(), n=1)
            hint = f"there are {', '.join(available())}, or package.module:Class"
            if near:
                hint = f"did you mean '{near[0]}'?"
            raise ConfigError(f"unknown objective '{name}': {hint}")
        module, attribute = f"{__name__}.{name}", "OBJECTIVE"
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"objective '{name}' cannot be loaded: {error}") from None


def config_of(name: str) -> type:
    """The Config class of an objective, by which `config.io.build` reads its section."""
    return find(name).Config


def parse_section(section: Mapping[str, Any]) -> tuple[type[Objective], Any]:
    """The class and the checked Config of an `objective:` section.

    Raises ConfigError for an unknown key, with the nearest name.
    """
    section = dict(section)
    owner = find(section.pop("name", "rlp"))
    known, elsewhere = names.names(owner.Config), tuple(names.dotted(PretrainConfig))
    for key in section:
        if key not in known:
            raise ConfigError(f"unknown key 'objective.{key}': {names.hint(key, known, elsewhere)}")
    return owner, parse(owner.Config, section, "objective")


def delimiters(section: Mapping[str, Any]) -> AddedTokens | None:
    """The tokens that an `objective:` section adds to tokenizer and model: a thought's tags, or others."""
    owner, config = parse_section(section)
    return Delimiters(config.open, config.close) if owner.has_positions else owner.control_tokens(config)


def thought_tags(section: Mapping[str, Any]) -> Delimiters | None:
    """The tags of a thought of an `objective:` section; None for objectives without thoughts."""
    tags = delimiters(section)
    return tags if isinstance(tags, Delimiters) else None


def load_objective(run: PretrainConfig, tokenizer: Any) -> Objective:
    """The objective of a run, ready to use."""
    owner, config = parse_section(run.objective)
    objective = owner(config, tokenizer)
    if unknown := sorted(set(objective.needs) - set(NEEDS)):
        raise ConfigError(
            f"objective {owner.__name__}: needs has {', '.join(map(repr, unknown))}, which no run can give; "
            f"there are {', '.join(NEEDS)}"
        )
    s = run.sampling
    if objective.has_positions and s.thoughts < objective.fewest_thoughts:
        raise ConfigError(
            f"sampling.thoughts is {s.thoughts}: a group baseline needs at least {objective.fewest_thoughts} "
            "thoughts per position"
        )
    objective.check_run(run)
    if "ntp_data" in objective.needs and run.ntp_data is None and not run.data.sources:
        raise ConfigError(
            f"objective {type(objective).__name__} needs a second stream of documents: set ntp_data"
        )
    eos = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    banned = banned_ids(s.banned_tokens, tokenizer)
    params = SamplingParams(s.max_thought_tokens, s.temperature, s.top_p, s.top_k, eos, banned)
    reduction = objective.token_reduction if run.loss.reduction == "auto" else run.loss.reduction
    return objective.with_setting(Setting(params, s.thoughts, run.loss.reader_coef, reduction))


def banned_ids(tokens: Sequence[str], tokenizer: Any) -> tuple[int, ...]:
    """The ids of `sampling.banned_tokens`; ConfigError for a text that is not one token."""
    vocabulary = tokenizer.get_vocab()
    if unknown := [token for token in tokens if token not in vocabulary]:
        raise ConfigError(f"sampling.banned_tokens: '{unknown[0]}' is not a token of the tokenizer")
    return tuple(vocabulary[token] for token in tokens)


load = load_objective  # the name it had before
