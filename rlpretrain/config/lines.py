"""The line of a YAML file that an error message is about."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import yaml

KEY = re.compile(r"[A-Za-z_]\w*(?:\.\w+)+|(?<=')[A-Za-z_]\w*(?=')")
"""A dotted name, or a name in quotes."""


def place_of(message: str, file: Path) -> str:
    """The file, and the line that `message` is about if it names one of its keys."""
    line = line_of(message, file.read_text(encoding="utf-8"))
    return str(file) if line is None else f"{file}, line {line}"


def line_of(message: str, text: str) -> int | None:
    """The line, from 1, of the first key that `message` names, or of the section that it would be in.

    None if no key of the text is named.
    """
    places = dict(_keys(yaml.compose(text, yaml.SafeLoader)))
    for name in KEY.findall(message):
        while name:
            if name in places:
                return places[name]
            name = name.rpartition(".")[0]
    return None


def _keys(node: yaml.Node | None, prefix: str = "") -> Iterator[tuple[str, int]]:
    """(dotted name, line) of every key."""
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        name = f"{prefix}{key.value}"
        yield name, key.start_mark.line + 1
        yield from _keys(value, f"{name}.")
