"""Settings of short runs that learn."""

from __future__ import annotations

from pathlib import Path

BASE = Path(__file__).parents[1] / "data" / "dial_base"
"""The demo's base model (2000 steps of `examples/dial_base.yaml`, seed 0), stored in bfloat16."""
