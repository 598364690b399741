"""The wheels that a machine with torch lacks: this project's core dependencies with all that they require."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TARGET = {"python_version": "3.12", "python_full_version": "3.12.0", "sys_platform": "linux", "extra": ""}


def needed_wheels() -> list[str]:
    """`name==version` lines, versions from locks/demo-cpu.txt, without torch and what torch requires.

    Requirements are read from installed packages, so this runs where that lock is installed: SystemExit if a
    package of it is missing.
    """
    pins = dict(
        line.split("==")
        for line in (ROOT / "locks" / "demo-cpu.txt").read_text().splitlines()
        if "==" in line
    )
    core = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    needed = _closure([name_of(line) for line in core if name_of(line) != "torch"])
    beyond = sorted(needed - _closure(["torch"]))
    if unknown := [name for name in beyond if name not in pins]:
        raise SystemExit(f"locks/demo-cpu.txt has no {', '.join(unknown)}: run `make lock`")
    return [f"{name}=={pins[name]}" for name in beyond]


def name_of(requirement: str) -> str:
    """The normalised name of a requirement."""
    return (
        re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0].lower().replace("_", "-").replace(".", "-")
    )


def _closure(names: list[str]) -> set[str]:
    """The packages and all that they require on the target, by their normalised names."""
    from packaging.requirements import Requirement

    known: set[str] = set()
    waiting = [(name, frozenset[str]()) for name in names]
    while waiting:
        name, extras = waiting.pop()
        try:
            lines = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            if name in ("triton", "setuptools") or name.startswith(("nvidia-", "cuda-")):
                continue  # come with torch
            raise SystemExit(f"{name} is not installed: run this where locks/demo-cpu.txt is") from None
        first = name not in known
        known.add(name)
        for line in lines:
            requirement = Requirement(line)
            wanted = any(
                requirement.marker is None or requirement.marker.evaluate(TARGET | {"extra": extra})
                for extra in ({""} | extras if first else extras)
            )
            needs = name_of(requirement.name), frozenset(requirement.extras)
            if wanted and (needs[0] not in known or needs[1]):
                waiting.append(needs)
    return known
