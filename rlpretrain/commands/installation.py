"""`rlpretrain doctor` and `rlpretrain metrics`."""

from __future__ import annotations

from typing import Any


def register(commands: Any) -> None:
    """Add `doctor` and `metrics` to the command line."""
    p = commands.add_parser("doctor", help="check this installation")
    p.set_defaults(command=lambda args, rest: _doctor())

    p = commands.add_parser("metrics", help="every logged number, its meaning and healthy range")
    p.set_defaults(command=lambda args, rest: _metrics())


def _doctor() -> int:
    from rlpretrain.tools import doctor

    return doctor.main()


def _metrics() -> int:
    from rlpretrain.tracking.metrics import table
    from rlpretrain.tracking.tables import show

    show(table())
    return 0
