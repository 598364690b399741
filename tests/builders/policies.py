"""Settings of sharded policies."""

from __future__ import annotations

from pathlib import Path

SHARDED = str(Path(__file__).parents[1] / "zero3.json")
"""Without it DeepSpeed keeps parameters as small as these whole on every rank, and ZeRO 3 shards nothing."""
