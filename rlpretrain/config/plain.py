"""YAML values that keep their text until the type of their field is known.

YAML reads `7864e12` as a number, `2024-01-01` as a date and `yes` as a boolean. If the field takes text, they
are text.
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
    """The text of an unquoted scalar or of a command-line value; `value` is the text as YAML reads it."""

    value: Any

    @classmethod
    def of(cls, text: str, value: Any) -> Plain:
        """Return `text` with its YAML value.

        The value may be a YAML error, which is raised if the field does not take text.
        """
        plain = cls(text)
        plain.value = value
        return plain


class _Loader(yaml.SafeLoader):
    """YAML 1.1 with `1e-4` as a number, and without dates and clock times, which no field takes."""


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
    """Return None for an empty scalar, else its text with its value."""
    if not node.value:
        return None
    value = yaml.SafeLoader.yaml_constructors[node.tag](loader, node)
    return Plain.of(node.value, node.value if ":" in node.value else value)  # 12:30 is not 750


for _tag in _KEPT:
    _Loader.add_constructor(_tag, _scalar)


EXPONENT = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$")
# In YAML 1.1, 1e-4 is a string.
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT, list("-+0123456789"))


def read(text: str) -> Any:
    """Parse a YAML text; scalars that are not strings in YAML become `Plain`. Raises yaml.YAMLError."""
    return yaml.load(text, _Loader)  # a SafeLoader


def parse_argument(text: str) -> Any:
    """Parse a value of the command line; a value in quotes is a string."""
    try:
        value = read(text)
    except yaml.YAMLError as error:
        return Plain.of(text, error)
    if isinstance(value, Plain):
        value = value.value
    in_quotes = isinstance(value, str) and text.lstrip()[:1] in ("'", '"')
    return value if in_quotes or value == text else Plain.of(text, value)


def where_and_why(error: yaml.YAMLError) -> str:
    """Return a YAML error in one line."""
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}" if mark else problem


def typed(value: Any) -> Any:
    """Return `value` as YAML reads it, for values without a known type."""
    if isinstance(value, Plain):
        if isinstance(value.value, yaml.YAMLError):
            raise ConfigError(f"'{value}' is not YAML: {where_and_why(value.value)}")
        return typed(value.value)
    if isinstance(value, Mapping):
        return {typed(key): typed(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(typed(item) for item in value)
    return value


def resolve(kind: Any, value: Any, where: str = "") -> Any:
    """Return `value` with every `Plain` read as the type `kind` needs it.

    That is its text if the type takes text, else its YAML value. Raises ConfigError with the field's name
    for a boolean, NaN or infinity in place of a number.
    """
    options = _options(kind)
    if isinstance(value, Plain):
        if _takes_none(options, value):
            return None
        if _takes_text(options, value):
            return str(value)
        if isinstance(value.value, yaml.YAMLError):
            raise ConfigError(f"'--{where} {value}' is not YAML: {where_and_why(value.value)}")
        value = value.value
    if isinstance(value, Mapping):
        return _resolve_mapping(options, value, where)
    if isinstance(value, list | tuple):
        return _resolve_sequence(options, value, where)
    if not is_dataclass(value):
        _check_number(options, value, where)
    return value


def _takes_none(options: Sequence[Any], plain: Plain) -> bool:
    """Return whether a value means None: `null`, or no text for a field that may be None."""
    return plain.value is None and (plain in NULLS or (type(None) in options and not plain))


def _takes_text(options: Sequence[Any], plain: Plain) -> bool:
    """Return whether a value means its text.

    A section takes text for one of its fields, as `headed` says, but not if the value is a mapping.
    """
    if any(is_dataclass(option) for option in options):
        return not isinstance(plain.value, dict)
    takes_list = any(_is(option, tuple, list) for option in options)
    if takes_list and isinstance(plain.value, list):
        return False
    takes_mapping = any(_is(option, dict, Mapping) for option in options)
    if takes_mapping and isinstance(plain.value, dict) and plain.startswith("{"):  # `a: b` may be a path
        return False
    return any(map(_is_text, options))


def _resolve_sequence(options: Sequence[Any], values: list[Any] | tuple[Any, ...], where: str) -> Any:
    """Resolve the items of a list or a tuple, which may have a type for each place."""
    arguments = [typing.get_args(option) for option in options if _is(option, tuple, list)]
    kinds = arguments[0] if arguments else (Any,)
    one_for_each = len(kinds) == len(values) and Ellipsis not in kinds
    return type(values)(
        resolve(kinds[i if one_for_each else 0], value, f"{where}.{i}") for i, value in enumerate(values)
    )


def _resolve_mapping(options: Sequence[Any], values: Mapping[Any, Any], where: str) -> dict[Any, Any]:
    """Resolve the values of a section or of a dictionary."""
    owner = next((option for option in options if is_dataclass(option)), None)
    if isinstance(owner, type) and issubclass(owner, Varied):
        owner = owner.variant(values)
    hints = _hints(owner) if owner is not None else {}
    default_kind = next((typing.get_args(option)[1] for option in options if _is(option, dict, Mapping)), Any)
    prefix = f"{where}." if where else ""
    resolved = {}
    for key, value in values.items():
        kind = hints.get(key, default_kind)
        resolved[str(key)] = unwrapped(value) if _is_later(kind) else resolve(kind, value, f"{prefix}{key}")
    return resolved


@functools.cache
def _hints(owner: type) -> dict[str, Any]:
    """Return the types of a dataclass's fields, annotations included."""
    return typing.get_type_hints(owner, include_extras=True)


LATER = "settled once its owner is known"
"""In an annotation: the values of this mapping stay `Plain`, since another type says what they are."""


def _is_later(kind: Any) -> bool:
    return LATER in getattr(kind, "__metadata__", ())


def unwrapped(value: Any) -> Any:
    """Return the mapping, list or string that a command-line value holds; its items are still Plain."""
    if isinstance(value, Plain) and not isinstance(value.value, yaml.YAMLError | float | int):
        return value.value
    return value


def _options(kind: Any) -> list[Any]:
    """Return the types that a value may have, without annotations: A and B for `A | B`."""
    if typing.get_origin(kind) is typing.Annotated:
        return _options(typing.get_args(kind)[0])
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        return [option for part in typing.get_args(kind) for option in _options(part)]
    return [kind]


def _is(kind: Any, *origins: Any) -> bool:
    return typing.get_origin(kind) in origins


def _is_text(kind: Any) -> bool:
    literals = typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else ()
    return kind is str or any(isinstance(literal, str) for literal in literals)


def _check_number(options: Sequence[Any], value: Any, where: str) -> None:
    """Refuse booleans, which pydantic would read as 0 or 1, and infinities for fields that take a number."""
    numbers = [option for option in options if option in (int, float)]
    if not numbers or bool in options or any(map(_is_text, options)):
        return
    if isinstance(value, bool):
        raise ConfigError(f"'{where}': expected a number, got {str(value).lower()}")
    try:
        number = float(value)
    except (TypeError, ValueError):
        return  # pydantic reports it
    if not math.isfinite(number):
        raise ConfigError(f"'{where}': expected a finite number, got {value}")
