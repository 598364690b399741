"""Section `data.mixing`: shares of the sources that follow their losses during a run."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import field as _field
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError

from rlpretrain.config.base import STRICT, Amount, Count

MIXERS = ("skill_it", "stratified")


def _read_edges(value: Any) -> Any:
    """A path, or a number of at least 0 for each pair of names; one message for all that is neither."""
    if value is None:
        return None
    if isinstance(value, str):
        return os.path.expanduser(value)
    try:
        read = {
            str(source): {str(target): float(edge) for target, edge in row.items()}
            for source, row in value.items()
        }
    except (AttributeError, TypeError, ValueError):
        read = None
    if read is None or not all(0 <= edge < math.inf for row in read.values() for edge in row.values()):
        raise PydanticCustomError(
            "no_edges", "expected a JSON file, or {source: {source: number of at least 0}}"
        )
    return read


Edges = Annotated[str | dict[str, dict[str, float]] | None, BeforeValidator(_read_edges)]
"""A JSON file of `rlpretrain mix edges`, or {trained source: {source whose loss falls: strength}}."""


@dataclass(config=STRICT, kw_only=True)
class MixingConfig:
    """Shares of the sources from their losses, in place of their weights (docs/mixtures.md).

    The weights of the sources hold until the first update. Settings of skill_it are refused elsewhere.
    """

    name: Literal["skill_it", "stratified"] | str
    """skill_it (arXiv 2307.14430), stratified (equal shares: a control) or package.module:function or :Class.
    A function of (progress, {source: loss}) returns {source: share}. An object of a Class is called likewise;
    it is made with {source: weight at the start}.
    """
    every: Count = 100
    """Steps between updates."""
    losses: Literal["auto", "held_out", "training"] = "auto"
    """held_out: the next-token loss of each source's file in `eval.data`, from the evaluation of that step.
    training: its mean over the steps since the last update. auto: held_out where `eval.data` names sources.
    """
    floor: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """Smallest share of a source. Smaller ones are raised to it; the others share the rest in proportion."""
    eta: Amount = 0.2
    """skill_it: how far shares follow the losses; at 0 they are equal."""
    window: Count = 3
    """skill_it: updates whose losses are added up."""
    edges: Edges = None
    """skill_it: a JSON file of `rlpretrain mix edges`, or {trained source: {source whose loss falls: edge}}.
    What is not named is 1 for a source and itself, and 0 for two sources.
    """
    targets: tuple[str, ...] = ()
    """skill_it: the sources whose losses count; by default all."""
    options: dict[str, Any] = _field(default_factory=dict)
    """Further arguments of a function or Class of your own."""

    @model_validator(mode="after")
    def _only_its_own(self) -> MixingConfig:
        own = {"eta": 0.2, "window": 3, "edges": None, "targets": ()}
        if self.name != "skill_it":
            foreign = [name for name, default in own.items() if getattr(self, name) != default]
            if foreign:
                raise PydanticCustomError(
                    "foreign", "{names}: settings of skill_it alone", {"names": ", ".join(foreign)}
                )
        elif self.edges is None:
            raise PydanticCustomError(
                "no_edges",
                "skill_it needs 'edges': a file of 'rlpretrain mix edges', or {} for none between sources",
            )
        if self.name in MIXERS and self.options:
            raise PydanticCustomError("no_options", "'options' are those of a function or Class of your own")
        return self


def check_names(mixing: MixingConfig, names: Mapping[str, Any]) -> None:
    """Raise PydanticCustomError for a name in the settings that is none of the sources."""
    named = set(mixing.targets)
    if isinstance(mixing.edges, dict):
        named |= mixing.edges.keys() | {target for row in mixing.edges.values() for target in row}
    if unknown := sorted(named - names.keys()):
        raise PydanticCustomError(
            "unknown_source",
            "'mixing' names '{name}', which is none of 'sources' ({known})",
            {"name": unknown[0], "known": ", ".join(names)},
        )
    if mixing.floor * len(names) > 1:
        raise PydanticCustomError(
            "high_floor",
            "'mixing.floor' {floor} is too high: {count} sources leave at most {most} for each",
            {"floor": mixing.floor, "count": len(names), "most": f"{1 / len(names):.3g}"},
        )
