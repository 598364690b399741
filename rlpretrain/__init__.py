"""Reinforcement learning as a pretraining objective.

    from rlpretrain import Pretrainer, PretrainConfig

Importing this package is light: torch and transformers are loaded with the first name that needs them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from rlpretrain import moved

if TYPE_CHECKING:
    from rlpretrain.config import PretrainConfig
    from rlpretrain.training.pretrainer import Pretrainer

__version__ = "0.1.0"
__all__ = ["PretrainConfig", "Pretrainer", "__version__"]

moved.install()

_HOME = {"PretrainConfig": "rlpretrain.config", "Pretrainer": "rlpretrain.training.pretrainer"}


def __getattr__(name: str) -> Any:
    """Load a public name from its module when it is first asked for (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
