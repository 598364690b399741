"""Reading configurations: YAML, command-line overrides, checks, and the output of `--fields`."""

from __future__ import annotations

import ast
import functools
import gc
import inspect
import itertools
import sys
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from rlpretrain.config import STRICT, ConfigError, ModelConfig, PretrainConfig, names, plain
from rlpretrain.config.engines import own_settings
from rlpretrain.config.lines import place_of
from rlpretrain.config.names import dotted, inner, owner_at

HEADS = {
    "model": "path",
    "data": "path",
    "ntp_data": "path",
    "objective": "name",
    "engine": "name",
    "baseline": "name",
    "reference": "path",
    "schedule": "name",
    "average": "kind",
    "mixing": "name",
}
"""Sections that may be given as a plain string, and the field that the string is."""


Find = Callable[[str], type]
"""From an objective's name to its Config class: `rlpretrain.objectives.config_of`."""


def build(values: Mapping[str, Any], find: Find | None = None) -> PretrainConfig:
    """Return a checked PretrainConfig from plain nested values.

    Fields of `model` may also be given beside it (DESIGN §6). With `find`, text fields of the objective keep
    the text in the YAML file or on the command line, even where YAML reads it as a number.
    """
    values = dict(values)
    if "objective" in values:
        values["objective"] = section(values["objective"], find)
    top_level = names.names(PretrainConfig)
    model_only = [name for name in names.names(ModelConfig) if name not in top_level]
    beside = {key: values.pop(key) for key in list(values) if key in model_only}
    if beside:
        model = values.get("model")
        if not isinstance(model, Mapping):
            model = {"path": model} if model else {}
        values["model"] = dict(model) | beside
    return parse(PretrainConfig, values)


def section(value: Any, find: Find | None = None) -> Any:
    """Return an objective section with its scalars resolved."""
    value = plain.unwrapped(value)
    if isinstance(value, str):
        return str(value)
    if find is None or not isinstance(value, Mapping):
        return plain.typed(value)
    resolved = plain.resolve(find(str(value.get("name", "rlp"))), value, "objective")
    return resolved | ({"name": str(value["name"])} if "name" in value else {})


def parse(owner: type, values: Mapping[str, Any], where: str = "") -> Any:
    """Return `values` as an instance of the dataclass `owner`.

    Raises ConfigError with the key, the reason, and a hint for unknown keys.
    """
    values = plain.resolve(owner, values, where)
    try:
        return _adapter(owner).validate_python(values)
    except ValidationError as error:
        lines = []
        for item in error.errors():
            key = ".".join(str(part) for part in (*filter(None, [where]), *item["loc"]))
            if item["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
                lines.append(f"unknown key '{key}': {_hint(owner, item['loc'])}")
            elif item["type"] in ("missing", "missing_argument"):
                lines.append(f"'{key}' is required")
            else:
                lines.append(f"'{key}': {item['msg']}, got {item['input']!r}")
        raise ConfigError("; ".join(lines)) from None


@functools.cache
def _adapter(owner: type) -> TypeAdapter[Any]:
    """Return pydantic's parser of a dataclass, which is slow to make."""
    return TypeAdapter(owner)


def _hint(owner: type, path: Sequence[Any]) -> str:
    """Return a hint for the unknown key at `path`."""
    known = names.names(owner_at(owner, path[:-1]))
    if owner is PretrainConfig and len(path) == 1:  # fields of `model` may be given beside it
        known += [name for name in names.names(ModelConfig) if name not in known]
    return names.hint(str(path[-1]), known, tuple(dotted(owner)))


def load_config(path: str | Path, overrides: Sequence[str] = (), find: Find | None = None) -> PretrainConfig:
    """Return the configuration in a YAML file, with command-line overrides (`--section.field value`).

    `find` is explained in `build`. Errors name the file, and the line where there are no overrides.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise ConfigError(
            f"no such config file: {file} (it comes first: rlpretrain train CONFIG.yaml --field value)"
        )
    values = apply_overrides(read_mapping(file), overrides)
    try:
        return build(values, find)
    except ConfigError as error:
        where = f"{file}, or in its overrides" if overrides else place_of(str(error), file)
        raise ConfigError(f"{error} (in {where})") from None


def read_mapping(file: Path) -> dict[str, Any]:
    """Parse a YAML file with `plain.read`; ConfigError if it cannot be read or is not a mapping."""
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
    """Set command-line values such as `--optim.lr 1e-4 --max_steps=10` in nested values, in place.

    The values stay `Plain` until the types of their fields are known. `--engine.name` chooses another engine:
    settings in `values` that only the former one has are left out.
    """
    given = list(_pairs(overrides))
    engine = plain.unwrapped(values.get("engine"))
    for name in (plain.parse_argument(text) for key, text in given if key == "engine.name"):
        if isinstance(engine, dict):
            values["engine"] = own_settings(engine | {"name": name})
    for key, text in given:
        *parents, field = key.split(".")
        node = values
        for parent in parents:
            child: Any = plain.unwrapped(node.get(parent))
            if not isinstance(child, dict):
                child = {HEADS.get(parent, "path"): child} if isinstance(child, str) else {}
            node[parent] = child
            node = child
        node[field] = plain.parse_argument(text)
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
        if key == "set" and "=" in text:
            raise ConfigError(f"a field is set by its own name: --{text} in place of --set {text}")
        yield key, text


def to_dict(config: Any) -> dict[str, Any]:
    """Return plain nested values, as `run.json` has them."""
    return asdict(config)


class FieldRow(NamedTuple):
    """A field of a configuration, as `--fields` prints it."""

    name: str
    default: str
    meaning: str


def describe(owner: type, prefix: str = "") -> list[FieldRow]:
    """Return the fields of a config dataclass and of its sections."""
    rows: list[FieldRow] = []
    for kind in names.kinds(owner):
        known = {row.name for row in rows}
        rows += [row for row in _rows(kind, prefix) if row.name not in known]
    return rows


def _rows(owner: type, prefix: str) -> list[FieldRow]:
    """`describe` for one class."""
    rows = []
    documented = getattr(owner, "__pydantic_fields__", None)
    if not documented:
        documented = dataclass(config=STRICT)(owner).__pydantic_fields__
    hints, meanings = typing.get_type_hints(owner), _meanings(owner)
    for field in fields(owner):
        name, meaning = f"{prefix}{field.name}", meanings.get(field.name, "")
        kind = inner(hints[field.name])
        if is_dataclass(kind) and isinstance(kind, type):
            rows.append(FieldRow(name, "", meaning))
            rows += describe(kind, f"{name}.")
        elif item := names.item_of(kind):
            rows.append(FieldRow(name, "", meaning))
            shared = {f"{name}.NAME.{other.name}" for other in fields(owner)}
            rows += [row for row in describe(item, f"{name}.NAME.") if row.name not in shared]
        else:
            info = documented.get(field.name)
            default = info.get_default(call_default_factory=True) if info is not None else field.default
            default_text = "required" if "Undefined" in repr(default) else _written(default)
            rows.append(FieldRow(name, default_text, meaning))
    return rows


def _written(default: Any) -> str:
    """A default in one line; a text that ends in white space in quotes."""
    is_plain = not isinstance(default, str) or default == default.strip()
    return str(default) if is_plain else repr(default)


def _meanings(owner: type) -> dict[str, str]:
    """Return the docstring below each field in the source as one line, inherited fields included."""
    meanings = {}
    for base in [b for b in reversed(owner.__mro__) if is_dataclass(b)]:
        body = _class_bodies(base.__module__).get(base.__qualname__, [])
        for statement, below in itertools.pairwise(body):
            if not isinstance(statement, ast.AnnAssign) or not isinstance(below, ast.Expr):
                continue
            if isinstance(statement.target, ast.Name):
                text = str(ast.literal_eval(below.value))
                # The source's line breaks mean nothing.
                meanings[statement.target.id] = " ".join(text.split())
    return meanings


@functools.cache
def _class_bodies(module: str) -> dict[str, list[ast.stmt]]:
    """The statements of each class in a module's source, by the class's `__qualname__`."""
    tree = parse_python(inspect.getsource(sys.modules[module]))
    bodies: dict[str, list[ast.stmt]] = {}

    def collect(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            inside = prefix
            if isinstance(child, ast.ClassDef):
                bodies[f"{prefix}{child.name}"] = child.body
                inside = f"{prefix}{child.name}."
            elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                inside = f"{prefix}{child.name}.<locals>."
            collect(child, inside)

    collect(tree, "")
    return bodies


def parse_python(source: str, filename: str = "<unknown>") -> ast.Module:
    """`ast.parse` without garbage collections inside it.

    CPython 3.11 raises a SystemError if such a collection runs code that parses, in this or another thread
    (python/cpython#106905).
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        return ast.parse(source, filename)
    finally:
        if was_enabled:
            gc.enable()


load = load_config  # the name it had before
