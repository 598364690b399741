"""Online mixing: the shares of the sources as a function of their losses (`data.mixing`)."""

from __future__ import annotations

import functools
import inspect
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rlpretrain.config import ConfigError, DataConfig, MixingConfig
from rlpretrain.config.mixing import MIXERS
from rlpretrain.config.plugins import find
from rlpretrain.files import finite

Hook = Callable[[float, Mapping[str, float]], Mapping[str, float]]
"""(share of the run that is done, next-token loss of each source in nats) → share of each, up to a factor.

The state of an object with `state_dict` and `load_state_dict` (of values that JSON keeps) is in checkpoints.
"""


class SkillIt:
    """Skill-It's online data selection (arXiv 2307.14430, Algorithm 1).

    p_i ∝ exp(η Σ_τ Σ_j A_ij L_j(τ)): τ runs over the last `window` updates, L_j is the loss of source j, and
    A_ij says how much training on i lowers it. Every update starts from equal shares, not from the last ones.
    A source is drawn for what it teaches the sources whose losses are still high, itself included.
    """

    def __init__(self, names: list[str], edges: Mapping[str, Mapping[str, float]], mixing: MixingConfig):
        self.names, self.eta, self.window = sorted(names), mixing.eta, mixing.window
        targets = mixing.targets or names
        self.edges = [
            [edges.get(i, {}).get(j, float(i == j)) * (j in targets) for j in self.names] for i in self.names
        ]
        self.past: list[list[float]] = []  # losses of the last updates, in the order of `names`

    def __call__(self, progress: float, losses: Mapping[str, float]) -> dict[str, float]:
        """The shares after one more update."""
        self.past = [*self.past, [losses[name] for name in self.names]][-self.window :]
        exponents = self.eta * (np.array(self.edges) @ np.array(self.past).sum(0))
        shares = np.exp(exponents - exponents.max())  # the largest is 1: nothing overflows
        return dict(zip(self.names, (shares / shares.sum()).tolist(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """The losses of the window, and the edges that they belong to."""
        return {"past": self.past, "edges": self.edges}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the losses of `state`; ConfigError if it was written with other edges."""
        if state["edges"] != self.edges:
            raise ConfigError(
                "data.mixing.edges: the file has other edges than when the checkpoint was written"
            )
        self.past = state["past"]


def stratified(progress: float, losses: Mapping[str, float]) -> dict[str, float]:
    """Equal shares, whatever the losses: the control of every other rule (arXiv 2411.05735)."""
    return dict.fromkeys(losses, 1.0)


def make_hook(data: DataConfig) -> Hook:
    """What `data.mixing` names. Raises ConfigError for edges or a hook that cannot be used."""
    mixing, names = data.mixing, list(data.sources)
    assert mixing is not None, "only a mixture with `mixing` has a hook"
    if mixing.name == "stratified":
        return stratified
    if mixing.name == "skill_it":
        return SkillIt(names, read_edges(mixing, names), mixing)
    return _own_hook(mixing, {name: source.weight_at(0.0) for name, source in data.sources.items()})


def _own_hook(mixing: MixingConfig, initial: Mapping[str, float]) -> Any:
    """A user's function or object, with its options."""
    hook, options = find(mixing.name, "data.mixing", MIXERS), mixing.options
    if not callable(hook):
        raise ConfigError(f"data.mixing: '{mixing.name}' is a {type(hook).__name__}, not a function or class")
    if isinstance(hook, type):
        try:
            hook = hook(initial, **options)
        except (TypeError, ValueError, LookupError) as error:
            raise ConfigError(f"data.mixing '{mixing.name}': {type(error).__name__}: {error}") from error
    elif hasattr(hook, "state_dict"):  # it would be shared by all runs of the process
        raise ConfigError(
            f"data.mixing: '{mixing.name}' is an object with a state: name its class {type(hook).__name__}"
        )
    else:
        hook = functools.partial(hook, **options)
    try:
        inspect.signature(hook).bind(0.0, {})
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"data.mixing: '{mixing.name}' cannot be called with (progress, losses) and its options: {error}"
        ) from error
    if hasattr(hook, "state_dict") != hasattr(hook, "load_state_dict"):
        raise ConfigError(
            f"data.mixing: '{mixing.name}' needs both state_dict and load_state_dict, or neither"
        )
    return hook


def read_edges(mixing: MixingConfig, names: list[str]) -> Mapping[str, Mapping[str, float]]:
    """{trained source: {source whose loss falls: strength}}, from the settings or the file that they name."""
    if not isinstance(mixing.edges, str):
        return mixing.edges or {}
    file, setting = Path(mixing.edges), f"data.mixing.edges {mixing.edges}"
    try:
        read = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{setting} cannot be read: {error}") from error
    edges = read.get("edges", read) if isinstance(read, dict) else None
    if not isinstance(edges, dict) or not all(isinstance(row, dict) for row in edges.values()):
        raise ConfigError(
            f"{setting}: expected {{source: {{source: strength}}}}, as `rlpretrain mix` writes it"
        )
    for source, row in edges.items():
        for target, edge in row.items():
            for name in (source, target):
                if name not in names:
                    raise ConfigError(
                        f"{setting} names '{name}', which is none of data.sources ({', '.join(names)})"
                    )
            if type(edge) not in (int, float) or not 0 <= edge < math.inf:
                raise ConfigError(
                    f"{setting}: the edge {source} → {target} is {edge!r}, not a number from 0 on"
                )
    return edges


def check_state(hook: Hook, where: str) -> None:
    """Raise ConfigError if a checkpoint would not give the state of a hook back."""
    state = getattr(hook, "state_dict", dict)()
    try:
        kept = json.loads(json.dumps(state, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: its state cannot be kept in a checkpoint: {error}") from error
    if kept != finite(state):  # tuples may become lists
        raise ConfigError(
            f"{where}: its state cannot be kept in a checkpoint: keys must be texts, in {state!r}"
        )


def check_shares(shares: Any, names: list[str], where: str) -> dict[str, float]:
    """What a hook returned, normalised to sum 1. ConfigError unless it has a share for each source."""
    if not isinstance(shares, Mapping):
        raise ConfigError(f"{where} returned a {type(shares).__name__}, not {{source: share}}")
    if missing := sorted(set(names) - set(shares)):
        raise ConfigError(
            f"{where} returned no share of {', '.join(missing)}: every source needs one, 0 or more"
        )
    if unknown := sorted(map(str, set(shares) - set(names))):
        raise ConfigError(
            f"{where} returned a share of {', '.join(unknown)}: the sources are {', '.join(names)}"
        )
    read: dict[str, float] = {}
    for name in names:
        try:
            read[name] = float(shares[name])
        except (TypeError, ValueError):
            read[name] = math.nan
        if not 0 <= read[name] < math.inf:
            raise ConfigError(
                f"{where} returned {shares[name]!r} for '{name}': expected a finite number from 0 on"
            )
    total = math.fsum(read.values())
    if not 0 < total < math.inf:
        raise ConfigError(f"{where} returned shares that sum to {total}: some source must have one above 0")
    return {name: share / total for name, share in read.items()}


def raise_to_floor(shares: Mapping[str, float], floor: float) -> dict[str, float]:
    """Shares of sum 1 with those below `floor` raised to it; the others share the rest in proportion.

    >>> raise_to_floor({"a": 0.9, "b": 0.1, "c": 0.0}, 0.05)
    {'a': 0.855, 'b': 0.095, 'c': 0.05}
    """
    low: set[str] = set()
    while True:
        above = math.fsum(share for name, share in shares.items() if name not in low)
        rest = 1.0 - floor * len(low)
        raised = {
            name: floor if name in low else share * rest / above if above > 0 else rest
            for name, share in shares.items()
        }
        below = {name for name, share in raised.items() if share < floor and name not in low}
        if not below:
            return raised
        low |= below
