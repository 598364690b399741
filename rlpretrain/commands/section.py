"""The objective section where a command takes it as one argument."""

from __future__ import annotations

from typing import Any

from rlpretrain.config import ConfigError


def objective_section(text: str) -> Any:
    """The objective section of a command line."""
    import yaml

    try:
        found = yaml.safe_load(text)
        return {"name": found} if isinstance(found, str) else found
    except yaml.YAMLError as error:
        raise ConfigError(f"--objective {text} is not YAML: {str(error).splitlines()[0]}") from None
