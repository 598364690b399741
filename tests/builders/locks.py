"""What the locks pin."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def pins_of(name: str) -> dict[str, str]:
    """Package to version; anything in the file but plain pins and comments is an error."""
    pins = {}
    for line in (ROOT / "locks" / f"{name}.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            package, version = line.split("==")
            assert not set("/:@; ") & set(line), f"not a plain pin: {line}"
            pins[package] = version
    return pins
