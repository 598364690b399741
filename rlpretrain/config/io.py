"""Reading configurations: YAML, command-line overrides, checks with the nearest name, and what `--fields` prints."""

from __future__ import annotations

import ast
import contextlib
import difflib
import inspect
import itertools
import textwrap
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from rlpretrain.config import STRICT, ConfigError, ModelConfig, PretrainConfig

HEADS = {"model": "path", "data": "path", "ntp_data": "path", "objective": "name", "engine": "name", "baseline": "name"}
"""Sections that a plain string may stand for, and the field it then is."""


def build(values: Mapping[str, Any]) -> PretrainConfig:
    """A checked PretrainConfig from plain nested values; fields of `model` may stand beside it (DESIGN §6)."""
    values = dict(values)
    beside = {k: values.pop(k) for k in list(values) if k not in _names(PretrainConfig) and k in _names(ModelConfig)}
    if beside:
        model = values.get("model")
        values["model"] = (dict(model) if isinstance(model, Mapping) else {"path": model} if model else {}) | beside
    return parse(PretrainConfig, values)


def parse(owner: type, values: Mapping[str, Any], where: str = "") -> Any:
    """`values` as an instance of the dataclass `owner`; raises ConfigError with key, reason and the nearest known name."""
    try:
        return TypeAdapter(owner).validate_python(dict(values))
    except ValidationError as error:
        lines = []
        for item in error.errors():
            key = ".".join(str(part) for part in (*filter(None, [where]), *item["loc"]))
            if item["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
                known = _names(_owner_at(owner, item["loc"][:-1]))
                if owner is PretrainConfig and len(item["loc"]) == 1:
                    known += [name for name in _names(ModelConfig) if name not in known]  # they may stand beside `model`
                near = difflib.get_close_matches(str(item["loc"][-1]), known, n=1)
                hint = f"did you mean '{near[0]}'?" if near else f"known here: {', '.join(known)}"
                lines.append(f"unknown key '{key}': {hint}")
            elif item["type"] in ("missing", "missing_argument"):
                lines.append(f"'{key}' is required")
            else:
                lines.append(f"'{key}': {item['msg']}, got {item['input']!r}")
        raise ConfigError("; ".join(lines)) from None


def load(path: str | Path, overrides: Sequence[str] = ()) -> PretrainConfig:
    """The configuration in a YAML file, with command-line `--section.field value` pairs laid over it."""
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"no such config file: {file} (it comes first: rlpretrain train CONFIG.yaml --field value)")
    return build(apply_overrides(read_mapping(file), overrides))


def read_mapping(file: Path) -> dict[str, Any]:
    """What a YAML file holds; ConfigError if it cannot be read or is no mapping."""
    try:
        values = yaml.safe_load(file.read_text()) or {}
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{file} is not YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{file} must hold a mapping of keys, found {type(values).__name__}")
    return values


def apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """`--optim.lr 1e-4 --max_steps=10` laid over nested values; the values are read as YAML."""
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
        *parents, leaf = key.split(".")
        node = values
        for parent in parents:
            below = node.get(parent)
            if not isinstance(below, dict):
                below = {HEADS.get(parent, "path"): below} if isinstance(below, str) else {}
            node[parent] = below
            node = below
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"'--{key} {text}' is not YAML: {str(error).splitlines()[0]}") from None
        if isinstance(value, str):  # YAML 1.1 reads 1e-4 as a word
            with contextlib.suppress(ValueError):
                value = float(value)
        node[leaf] = value
    return values


def to_dict(config: Any) -> dict[str, Any]:
    """Plain nested values, as they go to run.json."""
    return asdict(config)


def describe(owner: type, prefix: str = "") -> list[tuple[str, str, str]]:
    """(field, default, meaning) of a config dataclass and its parts: what `--help` prints."""
    rows = []
    documented = getattr(owner, "__pydantic_fields__", None) or dataclass(config=STRICT)(owner).__pydantic_fields__
    hints, meanings = typing.get_type_hints(owner), _meanings(owner)
    for f in fields(owner):
        kind = _inner(hints[f.name])
        text = meanings.get(f.name, "")
        if is_dataclass(kind):
            rows.append((f"{prefix}{f.name}", "", text))
            rows += describe(kind, f"{prefix}{f.name}.")
        else:
            info = documented.get(f.name)
            default = info.get_default(call_default_factory=True) if info is not None else f.default
            rows.append((f"{prefix}{f.name}", "required" if "Undefined" in repr(default) else str(default), text))
    return rows


def _meanings(owner: type) -> dict[str, str]:
    """The sentence under each field in the source, inherited fields included."""
    found = {}
    for base in [b for b in reversed(owner.__mro__) if is_dataclass(b)]:
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body  # type: ignore[attr-defined]
        for line, below in itertools.pairwise(body):
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and isinstance(below, ast.Expr):
                found[line.target.id] = inspect.cleandoc(str(ast.literal_eval(below.value)))
    return found


def _names(owner: Any) -> list[str]:
    return [f.name for f in fields(owner)] if is_dataclass(owner) else []


def _inner(kind: Any) -> Any:
    """X of `X | None`."""
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        return next(a for a in typing.get_args(kind) if a is not type(None))
    return kind


def _owner_at(owner: Any, path: Sequence[Any]) -> Any:
    for part in path:
        owner = _inner(typing.get_type_hints(owner).get(part, owner))
    return owner
