"""A value of a type that its field does not take is named in words, in every field of every file."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlpretrain.config import ConfigError, PretrainConfig
from rlpretrain.config.io import build, describe
from rlpretrain.experiments.experiment import Experiment
from rlpretrain.experiments.loading import load_experiment
from rlpretrain.experiments.ratio_grid import Grid, load_grid
from rlpretrain.objectives import available, config_of, find, parse_section

WRONG = (3, True, None, [None], {"zz": {"y": [1]}}, {1: 2}, "zz", math.nan)
"""What a hurried YAML file may hold. Some fields take some of them."""
INTERNAL = ("function-", "[str", "dataclass", "NoneType", "kwargs")
"""Words of Python and pydantic, which say nothing to a user."""


def names_of(owner: type) -> list[str]:
    """Every field of a configuration and every section, as dotted names."""
    fields = [name.replace("NAME", "web") for name, *_ in describe(owner)]
    sections = {name.rsplit(".", depth)[0] for name in fields for depth in range(1, name.count(".") + 1)}
    return sorted({*fields, *sections})


def without_data(names: list[str]) -> list[str]:
    """Names that are not fields of documents: those are the same everywhere, and tested in a run."""
    return [name for name in names if "data." not in name]


def changed(values: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    """`values` with a value under a dotted name."""
    parts, values = name.split("."), copy.deepcopy(values)
    section = values
    for part in parts[:-1]:
        if not isinstance(section.get(part), dict):
            section[part] = {"path": "x"} if part in ("model", "data", "web") else {}
        section = section[part]
        if part == "sources":
            values.get("data", {}).pop("path", None)
    section[parts[-1]] = value
    return values


def refusals(attempt: Callable[[Any], Any]) -> Iterator[str]:
    """The words of each refusal; anything else than a ConfigError fails the test."""
    for value in WRONG:
        try:
            attempt(value)
        except ConfigError as error:
            yield str(error)


def check_words(said: list[str]) -> None:
    assert said, "nothing was refused"
    for text in said:
        assert not any(word in text for word in INTERNAL), text
        assert len(text) < 700, text


def test_in_a_run():
    plain: dict[str, Any] = {"model": "x", "data": {"path": "y"}}
    said = []
    for name in names_of(PretrainConfig):
        said += refusals(lambda value, name=name: build(changed(plain, name, value)))
    check_words(said)
    assert any("'data': expected a section with fields, got None" in text for text in said)
    assert any("'eval.data': expected a file, or {name of a source: file}" in text for text in said)


@pytest.mark.parametrize("name", sorted(available()))
def test_in_an_objective(name):
    def attempt(values: dict[str, Any]) -> None:
        parse_section(build({"model": "x", "data": "y", "objective": values}, config_of).objective)

    fields = without_data(names_of(find(name).Config))
    said = []
    for field in fields:
        said += refusals(lambda value, field=field: attempt(changed({"name": name}, field, value)))
    if fields:
        check_words(said)


@pytest.mark.parametrize("recipe", [{}, {"recipe": "paper"}])
def test_as_the_objective(recipe):
    check_words(list(refusals(lambda value: build({"model": "x", "data": "y", "objective": value} | recipe))))


def test_in_an_experiment(tmp_path: Path):
    (tmp_path / "a.yaml").write_text(yaml.safe_dump({"model": "x", "data": "y"}))
    plain = {"methods": {"web": {"config": "a.yaml"}}, "evaluation": {"data": "z"}}
    file = tmp_path / "experiment.yaml"

    def attempt(values: dict[str, Any]) -> None:
        file.write_text(yaml.safe_dump(values))
        load_experiment(file)

    more = ("methods.web.set.optim", "methods.web.search.optim.lr", "common.optim", "evaluation.pass_at.ks")
    said = []
    for name in (*without_data(names_of(Experiment)), *more):
        said += refusals(lambda value, name=name: attempt(changed(plain, name, value)))
    check_words(said)


def test_in_a_grid_of_ratios(tmp_path: Path):
    sources = {"a": {"path": "p"}, "b": {"path": "q"}}
    run = {
        "model": "x",
        "objective": "ntp",
        "data": {"sources": sources},
        "eval": {"data": {"a": "h", "b": "i"}},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    file = tmp_path / "grid.yaml"

    def attempt(values: dict[str, Any]) -> None:
        file.write_text(yaml.safe_dump(values))
        load_grid(file)

    plain = {"config": "run.yaml", "general": "a", "domain": "b"}
    attempt(plain)
    said = []
    for name in (*names_of(Grid), "variants.v", "variants.v.optim", "general.a"):
        said += refusals(lambda value, name=name: attempt(changed(plain, name, value)))
        said += refusals(lambda value, name=name: attempt(changed(plain, name, [[value]])))
    check_words(said)
