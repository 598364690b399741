"""A configuration file with comments, as `rlpretrain init` writes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from rlpretrain.config.plain import Plain, typed


@dataclass
class FirstConfig:
    """A configuration as nested values, and a comment for some of their dotted names."""

    values: dict[str, Any]
    comments: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """What the user should know before the first run."""

    def set(self, name: str, value: Any, comment: str = "") -> None:
        """Set the field with a dotted name."""
        *parents, last = name.split(".")
        section = self.values
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = value
        if comment:
            self.comments[name] = comment

    def replace(self, fields: Mapping[str, Any], before: str = "") -> None:
        """Set nested fields in place of what is there, and drop the comments of what is replaced."""
        for name, value in fields.items():
            if isinstance(value, Mapping):
                self.replace(value, f"{before}{name}.")
            else:
                self.set(before + name, value)
                self.comments.pop(before + name, None)


def as_yaml(first: FirstConfig) -> str:
    """The text of the file: sections, and comments behind their fields."""
    lines = ["# Written by `rlpretrain init`. Every field and its meaning: rlpretrain train --fields"]
    for name, value in first.values.items():
        if isinstance(value, Mapping):
            lines.append(f"{name}:")
            lines += [_line(first, f"{name}.{inner}", inner, v, "  ") for inner, v in value.items()]
        else:
            lines.append(_line(first, name, name, value, ""))
    return "\n".join(lines) + "\n"


def _line(first: FirstConfig, name: str, key: str, value: Any, indent: str) -> str:
    if isinstance(value, Plain):  # of the command line: YAML reads what was typed there
        text = str(value)
    else:
        options: dict[str, Any] = {"sort_keys": False, "width": 1 << 16, "allow_unicode": True}
        text = yaml.safe_dump(typed(value), default_flow_style=True, **options)
    line = f"{indent}{key}: {text.strip().removesuffix('...').strip()}"
    comment = first.comments.get(name)
    return f"{line:<44}  # {comment}" if comment else line
