"""Names of things in a configuration that may be a user's own: a name of ours, or `package.module:name`."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from typing import Any

from rlpretrain.config.base import ConfigError


def find(name: str, setting: str, ours: Iterable[str] = ()) -> Any:
    """What `package.module:name` is. Raises ConfigError for a name without a colon, and for one that cannot
    be imported.

    `setting` is the field that holds the name, and `ours` are the names that it may have otherwise: they are
    in the message.
    """
    module, colon, attribute = name.partition(":")
    if not colon or not module or not attribute:
        ours = list(ours)
        near = difflib.get_close_matches(name, ours, n=1)
        known = ", ".join([*ours, "or package.module:name"])
        raise ConfigError(
            f"{setting}: no '{name}'; " + (f"did you mean '{near[0]}'?" if near else f"there are {known}")
        )
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{setting}: '{name}' cannot be loaded: {error}") from error
