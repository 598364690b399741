"""Reading configurations: YAML, command-line overrides, checks with the nearest name, and what `--fields`
prints.
"""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import textwrap
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from rlpretrain.config import STRICT, ConfigError, ModelConfig, PretrainConfig, names, plain
from rlpretrain.config.engines import own_settings
from rlpretrain.config.names import dotted, inner, owner_at

HEADS = {
    "model": "path",
    "data": "path",
    "ntp_data": "path",
    "objective": "name",
    "engine": "name",
    "baseline": "name",
}
"""Sections that a plain string may stand for, and the field it then is."""


Find = Callable[[str], type]
"""The Config class of an objective by its name: `rlpretrain.objectives.config_of`."""


def build(values: Mapping[str, Any], find: Find | None = None) -> PretrainConfig:
    """A checked PretrainConfig from plain nested values; fields of `model` may stand beside it (DESIGN §6).

    With `find`, an objective's text fields that were read from YAML or a command line stay the text that
    stands there.
    """
    values = dict(values)
    if "objective" in values:
        values["objective"] = section(values["objective"], find)
    fields_of_model = names.names(ModelConfig)
    beside = {
        k: values.pop(k)
        for k in list(values)
        if k not in names.names(PretrainConfig) and k in fields_of_model
    }
    if beside:
        model = values.get("model")
        values["model"] = (
            dict(model) if isinstance(model, Mapping) else {"path": model} if model else {}
        ) | beside
    return parse(PretrainConfig, values)


def section(given: Any, find: Find | None = None) -> Any:
    """An objective section as it was given, its scalars settled."""
    given = plain.unwrapped(given)
    if isinstance(given, str):
        return str(given)
    if find is None or not isinstance(given, Mapping):
        return plain.typed(given)
    owner = find(str(given.get("name", "rlp")))
    return plain.settle(owner, given, "objective") | ({"name": str(given["name"])} if "name" in given else {})


def parse(owner: type, values: Mapping[str, Any], where: str = "") -> Any:
    """`values` as an instance of the dataclass `owner`; raises ConfigError with key, reason and the
    nearest known name.
    """
    values = plain.settle(owner, values, where)
    try:
        return _adapter(owner).validate_python(values)
    except ValidationError as error:
        lines = []
        for item in error.errors():
            key = ".".join(str(part) for part in (*filter(None, [where]), *item["loc"]))
            if item["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
                lines.append(f"unknown key '{key}': {_instead(owner, item['loc'])}")
            elif item["type"] in ("missing", "missing_argument"):
                lines.append(f"'{key}' is required")
            else:
                lines.append(f"'{key}': {item['msg']}, got {item['input']!r}")
        raise ConfigError("; ".join(lines)) from None


@functools.cache
def _adapter(owner: type) -> TypeAdapter[Any]:
    """Pydantic's reader of a dataclass, which takes a while to make."""
    return TypeAdapter(owner)


def _instead(owner: type, place: Sequence[Any]) -> str:
    """What could be meant by the key at `place`, which is none."""
    known = names.names(owner_at(owner, place[:-1]))
    if owner is PretrainConfig and len(place) == 1:
        known += [
            name for name in names.names(ModelConfig) if name not in known
        ]  # they may stand beside `model`
    return names.hint(str(place[-1]), known, tuple(dotted(owner)))


def load_config(path: str | Path, overrides: Sequence[str] = (), find: Find | None = None) -> PretrainConfig:
    """The configuration in a YAML file, with command-line `--section.field value` pairs laid over it; see
    `build`.

    An error in it names the file, unless it is in what was laid over.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise ConfigError(
            f"no such config file: {file} (it comes first: rlpretrain train CONFIG.yaml --field value)"
        )
    values = read_mapping(file)
    laid_over = apply_overrides(values, overrides)
    try:
        return build(laid_over, find)
    except ConfigError as error:
        where = f"{file}, or what was laid over it" if overrides else str(file)
        raise ConfigError(f"{error} (in {where})") from None


def read_mapping(file: Path) -> dict[str, Any]:
    """What a YAML file holds, as `plain.read` gives it; ConfigError if it cannot be read or is no mapping."""
    try:
        values = plain.read(file.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{file} is not YAML: {plain.where_and_why(error)}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{file} must hold a mapping of keys, found {type(values).__name__}")
    return values


def apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """`--optim.lr 1e-4 --max_steps=10` laid over nested values; each is read as its field's type wants it.

    `--engine.name` chooses another engine: settings in `values` that only the former one has are left out.
    """
    given = list(_pairs(overrides))
    engine = plain.unwrapped(values.get("engine"))
    for name in (plain.given(text) for key, text in given if key == "engine.name"):
        if isinstance(engine, dict):
            values["engine"] = own_settings(engine | {"name": name})
    for key, text in given:
        *parents, leaf = key.split(".")
        node = values
        for parent in parents:
            below = plain.unwrapped(node.get(parent))
            if not isinstance(below, dict):
                below = {HEADS.get(parent, "path"): below} if isinstance(below, str) else {}
            node[parent] = below
            node = below
        node[leaf] = plain.given(text)
    return values


def _pairs(overrides: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(dotted name, text) of each `--name text` or `--name=text`."""
    words = list(overrides)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise ConfigError(f"expected --field value, got '{word}'")
        key, eq, text = word[2:].partition("=")
        if not eq:
            if not words:
                raise ConfigError(f"'--{key}' needs a value")
            text = words.pop(0)
        yield key, text


def to_dict(config: Any) -> dict[str, Any]:
    """Plain nested values, as they go to run.json."""
    return asdict(config)


def describe(owner: type, prefix: str = "") -> list[tuple[str, str, str]]:
    """(field, default, meaning) of a config dataclass and its parts: what `--help` prints."""
    rows: list[tuple[str, str, str]] = []
    for kind in names.kinds(owner):
        known = {row[0] for row in rows}
        rows += [row for row in _rows(kind, prefix) if row[0] not in known]
    return rows


def _rows(owner: type, prefix: str) -> list[tuple[str, str, str]]:
    """`describe` for one class."""
    rows = []
    documented = (
        getattr(owner, "__pydantic_fields__", None) or dataclass(config=STRICT)(owner).__pydantic_fields__
    )
    hints, meanings = typing.get_type_hints(owner), _meanings(owner)
    for f in fields(owner):
        kind = inner(hints[f.name])
        text = meanings.get(f.name, "")
        if is_dataclass(kind):
            rows.append((f"{prefix}{f.name}", "", text))
            rows += describe(kind, f"{prefix}{f.name}.")
        else:
            info = documented.get(f.name)
            default = info.get_default(call_default_factory=True) if info is not None else f.default
            rows.append(
                (f"{prefix}{f.name}", "required" if "Undefined" in repr(default) else str(default), text)
            )
    return rows


def _meanings(owner: type) -> dict[str, str]:
    """The sentence under each field in the source, inherited fields included."""
    found = {}
    for base in [b for b in reversed(owner.__mro__) if is_dataclass(b)]:
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body  # type: ignore[attr-defined]
        for line, below in itertools.pairwise(body):
            if (
                isinstance(line, ast.AnnAssign)
                and isinstance(line.target, ast.Name)
                and isinstance(below, ast.Expr)
            ):
                found[line.target.id] = inspect.cleandoc(str(ast.literal_eval(below.value)))
    return found


load = load_config  # the name it had before
