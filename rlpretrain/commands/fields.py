"""`rlpretrain train --fields`: every field of a run by section, or those that are asked for."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from rlpretrain.config import ConfigError, PretrainConfig, names
from rlpretrain.config.io import FieldRow, describe
from rlpretrain.objectives import available, find
from rlpretrain.tracking.tables import show


def print_fields(asked: str, objective: str | None) -> None:
    """Print the fields that are `asked` for.

    A dotted name stands for a field, or a section with all its fields; any other words for the fields that
    have them in their name or meaning; an empty text for all, with a table for each section. `objective` is
    one of your own whose fields are listed beside the library's. Raises ConfigError if nothing is found.
    """
    rows = all_fields(objective)
    if asked:
        _show("field", find_fields(rows, asked))
        return
    for section, of_section in itertools.groupby(rows, key=_section_of):
        _show(section, of_section)


def _show(heading: str, rows: Iterable[FieldRow]) -> None:
    from rich.table import Table

    table = Table(heading, "default", "meaning")
    for row in rows:
        table.add_row(*row)
    show(table)


def all_fields(objective: str | None = None) -> list[FieldRow]:
    """The fields of a run, and after them those of every objective, with its name in brackets."""
    rows = describe(PretrainConfig)
    for name in dict.fromkeys([*available(), *filter(None, [objective])]):
        rows += [row._replace(name=f"objective.{row.name} ({name})") for row in describe(find(name).Config)]
    return rows


def find_fields(rows: Sequence[FieldRow], asked: str) -> list[FieldRow]:
    """The rows of a field or section, else those that have all words of `asked` in their name or meaning."""
    words = asked.lower().split()
    found = [row for row in rows if f"{row.name}.".startswith((f"{asked}.", f"{asked} "))]
    found = found or [row for row in rows if all(word in " ".join(row).lower() for word in words)]
    if not found:
        known = [row.name.split(" ")[0] for row in rows]
        near = names.hint(asked, sorted({name.split(".")[0] for name in known}), known)
        raise ConfigError(f"--fields {asked}: no section or field has this in its name or meaning: {near}")
    return found


def _section_of(row: FieldRow) -> str:
    """The first part of a dotted name; the objective's name too."""
    name, _, objective = row.name.partition(" ")
    section = name.partition(".")[0]
    return f"{section} {objective}".rstrip()
