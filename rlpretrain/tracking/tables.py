"""Prints tables without cutting their cells short."""

from __future__ import annotations

import sys
from typing import Any


def show(table: Any) -> None:
    """Print a table without markup: folded on a narrow terminal, at full width into a pipe or file."""
    from rich.console import Console

    for column in table.columns:
        column.overflow = "fold"
    wide = Console(width=100_000, markup=False)
    width = None if sys.stdout.isatty() else max(80, wide.measure(table).maximum)
    Console(width=width, markup=False).print(table)
