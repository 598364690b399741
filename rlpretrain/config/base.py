"""Types and options that all sections of the configuration share."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field
from pydantic_core import ArgsKwargs, PydanticCustomError

STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)
Count = Annotated[int, Field(ge=1)]
Amount = Annotated[float, Field(ge=0)]
Whole = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""A seed that numpy, torch and vLLM accept."""


def as_text(value: Any) -> Any:
    """A path object as its text, any other value as it is."""
    return os.fspath(value) if isinstance(value, os.PathLike) else value


PathText = Annotated[str, BeforeValidator(as_text), AfterValidator(os.path.expanduser)]
"""A path, or a hub id. A leading `~` becomes the user's home folder, since no shell expands it in YAML."""


def as_fields(given: Any) -> dict[str, Any]:
    """The fields that the validator of a section was given, by a mapping or by the constructor.

    Refuses anything else: an empty section of a YAML file is None.
    """
    if isinstance(given, ArgsKwargs):
        return dict(given.kwargs or {})
    if isinstance(given, Mapping):
        return dict(given)
    raise PydanticCustomError("no_section", "expected a section with fields")


def headed(head: str) -> BeforeValidator:
    """Accept a plain string or a path object for a section, as the value of its field `head`."""
    return BeforeValidator(lambda value: {head: value} if isinstance(as_text(value), str) else value)


class Varied:
    """A section whose fields depend on one of its own values, `name`: each name has a subclass."""

    @classmethod
    def variants(cls) -> dict[str, type]:
        """The subclass of each name."""
        raise NotImplementedError

    @classmethod
    def variant(cls, values: Mapping[str, Any]) -> type:
        """The subclass that a section with these values is."""
        raise NotImplementedError


class ConfigError(ValueError):
    """A configuration that cannot be used; the message says which key, why, and what to use instead."""
