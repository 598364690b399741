"""Objects that a configuration names: one of ours by its name, or a user's as `package.module:name`."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from typing import Any

from rlpretrain.config.base import ConfigError


def find(name: str, setting: str, ours: Iterable[str] = ()) -> Any:
    """Import the object at `package.module:name`.

    Raises ConfigError for a name without a colon, and for one that cannot be imported. For the message,
    `setting` is the field that holds the name, and `ours` are the names without a colon that it accepts.
    """
    module, colon, attribute = name.partition(":")
    if not colon or not module or not attribute:
        ours = list(ours)
        near = difflib.get_close_matches(name, ours, n=1)
        if near:
            hint = f"did you mean '{near[0]}'?"
        elif ours:
            hint = f"there are {', '.join(ours)}, or package.module:name"
        else:
            hint = "it must be package.module:name"
        raise ConfigError(f"{setting}: no '{name}'; {hint}")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{setting}: '{name}' cannot be loaded: {error}") from error
