"""Tables on a terminal, and whole where nobody folds them: piped, no name is cut short."""

from __future__ import annotations

import sys
from typing import Any


def show(table: Any) -> None:
    """Print a table, `[words]` as they stand; a narrow terminal folds them, a pipe gets it as wide as it
    is.
    """
    from rich.console import Console

    for column in table.columns:
        column.overflow = "fold"
    wide = Console(width=100_000, markup=False)
    width = None if sys.stdout.isatty() else max(80, wide.measure(table).maximum)
    Console(width=width, markup=False).print(table)
