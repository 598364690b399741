"""YAML that keeps the text of what it reads as something else, until the field's type says which of the two
is meant.

YAML makes a number of `7864e12`, a date of `2024-01-01` and a truth of `yes`. For a field that takes text
they are text.
"""

from __future__ import annotations

import functools
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any

import yaml

from rlpretrain.config.base import ConfigError, Varied

NULLS = ("null", "Null", "NULL", "~")


class Plain(str):
    """An unquoted scalar, or a value of the command line: its text, and in `value` what YAML makes of it."""

    value: Any

    @classmethod
    def of(cls, text: str, value: Any) -> Plain:
        """`text`, which may also be read as `value`; an error as `value` is raised once the text cannot be
        meant.
        """
        found = cls(text)
        found.value = value
        return found


class _Loader(yaml.SafeLoader):
    """YAML 1.1 with `1e-4` as a number and without dates and clock times, which no field takes."""


_KEPT = {
    "tag:yaml.org,2002:bool",
    "tag:yaml.org,2002:int",
    "tag:yaml.org,2002:float",
    "tag:yaml.org,2002:null",
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _scalar(loader: _Loader, node: yaml.ScalarNode) -> Any:
    """Null where nothing stands; else the text and its value."""
    if not node.value:
        return None
    made = yaml.SafeLoader.yaml_constructors[node.tag](loader, node)
    return Plain.of(node.value, node.value if ":" in node.value else made)  # 12:30 is not 750


for _tag in _KEPT:
    _Loader.add_constructor(_tag, _scalar)


EXPONENT = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$")
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", EXPONENT, list("-+0123456789")
)  # 1e-4, a word in YAML 1.1


def read(text: str) -> Any:
    """What a YAML text holds, its scalars `Plain` where they are no text to YAML; raises yaml.YAMLError."""
    return yaml.load(text, _Loader)  # a SafeLoader


def given(text: str) -> Any:
    """A value of the command line; one in quotes is what stands between them."""
    try:
        value = read(text)
    except yaml.YAMLError as error:
        return Plain.of(text, error)
    if isinstance(value, Plain):
        value = value.value
    in_quotes = isinstance(value, str) and text.lstrip()[:1] in ("'", '"')
    return value if in_quotes or value == text else Plain.of(text, value)


def where_and_why(error: yaml.YAMLError) -> str:
    """A YAML error in a line."""
    mark = getattr(error, "problem_mark", None)
    why = getattr(error, "problem", None) or str(error).splitlines()[0]
    return f"line {mark.line + 1}, column {mark.column + 1}: {why}" if mark else why


def typed(value: Any) -> Any:
    """`value` as YAML reads it, where no type says otherwise."""
    if isinstance(value, Plain):
        if isinstance(value.value, yaml.YAMLError):
            raise ConfigError(f"'{value}' is not YAML: {where_and_why(value.value)}")
        return typed(value.value)
    if isinstance(value, Mapping):
        return {typed(key): typed(below) for key, below in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(typed(below) for below in value)
    return value


def settle(kind: Any, value: Any, where: str = "") -> Any:
    """`value` with each `Plain` as the type `kind` wants it: its text where that takes text, else what YAML
    makes of it.

    Raises ConfigError that names the field where a number is due and a truth value, NaN or infinity was
    given.
    """
    options = _options(kind)
    none = type(None) in options
    if isinstance(value, Plain):
        if value.value is None and (value in NULLS or none and not value):
            return None
        section = any(is_dataclass(option) for option in options)
        listed = isinstance(value.value, list) and any(_is(option, tuple, list) for option in options)
        if section and not isinstance(value.value, dict):
            return str(value)  # a section given by its head: a path or a name
        if not section and not listed and any(map(_is_text, options)):
            return str(value)
        if isinstance(value.value, yaml.YAMLError):
            raise ConfigError(f"'--{where} {value}' is not YAML: {where_and_why(value.value)}")
        value = value.value
    if isinstance(value, Mapping):
        return _settled_mapping(options, value, where)
    if isinstance(value, list | tuple):
        inner = [typing.get_args(option) for option in options if _is(option, tuple, list)]
        below = inner[0] if inner else (Any,)
        fixed = len(below) == len(value) and Ellipsis not in below
        return type(value)(settle(below[i if fixed else 0], v, f"{where}.{i}") for i, v in enumerate(value))
    if not is_dataclass(value):
        _check_number(options, value, where)
    return value


def _settled_mapping(options: Sequence[Any], value: Mapping[Any, Any], where: str) -> dict[Any, Any]:
    owner = next((option for option in options if is_dataclass(option)), None)
    if isinstance(owner, type) and issubclass(owner, Varied):
        owner = owner.variant(value)
    hints = _hints(owner) if owner is not None else {}
    below = next((typing.get_args(option)[1] for option in options if _is(option, dict, Mapping)), Any)
    dotted = f"{where}." if where else ""
    settled = {}
    for key, item in value.items():
        kind = hints.get(key, below)
        settled[str(key)] = unwrapped(item) if _is_later(kind) else settle(kind, item, f"{dotted}{key}")
    return settled


@functools.cache
def _hints(owner: type) -> dict[str, Any]:
    return typing.get_type_hints(owner, include_extras=True)


LATER = "settled once its owner is known"
"""In an annotation: the values of this mapping stay `Plain`, since another type than this field's says
what they are.
"""


def _is_later(kind: Any) -> bool:
    return LATER in getattr(kind, "__metadata__", ())


def unwrapped(value: Any) -> Any:
    """A mapping that the command line gave as one value, its own values still Plain."""
    return (
        value.value
        if isinstance(value, Plain) and not isinstance(value.value, yaml.YAMLError | float | int)
        else value
    )


def _options(kind: Any) -> list[Any]:
    """The types that a value may have, without annotations: of `A | None` both."""
    if typing.get_origin(kind) is typing.Annotated:
        return _options(typing.get_args(kind)[0])
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        return [option for part in typing.get_args(kind) for option in _options(part)]
    return [kind]


def _is(kind: Any, *owners: Any) -> bool:
    return typing.get_origin(kind) in owners


def _is_text(kind: Any) -> bool:
    literals = typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else ()
    return kind is str or any(isinstance(literal, str) for literal in literals)


def _check_number(options: Sequence[Any], value: Any, where: str) -> None:
    """No truth value and nothing infinite where a number is due; pydantic would take the first as 0 or 1."""
    numbers = [option for option in options if option in (int, float)]
    if not numbers or bool in options or any(map(_is_text, options)):
        return
    if isinstance(value, bool):
        raise ConfigError(f"'{where}': a number is due, got {str(value).lower()}")
    try:
        number = float(value)
    except (TypeError, ValueError):
        return  # pydantic says what is wrong with it
    if not math.isfinite(number):
        raise ConfigError(f"'{where}': a finite number is due, got {value}")
