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
    from rlpretrain import doctor

    return doctor.main()


def _metrics() -> int:
    from rlpretrain.commands.tables import show
    from rlpretrain.metrics import table

    show(table())
    return 0
