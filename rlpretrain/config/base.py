"""What every section of the configuration is made with."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, ConfigDict, Field

STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True)
Count = Annotated[int, Field(ge=1)]
Amount = Annotated[float, Field(ge=0)]


def headed(head: str) -> BeforeValidator:
    """Let a plain string stand for a section whose `head` field it is."""
    return BeforeValidator(lambda value: {head: value} if isinstance(value, str) else value)


class ConfigError(ValueError):
    """A configuration that cannot be used; the message says which key, why, and what would do."""
