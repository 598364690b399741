"""Types of command-line arguments: paths, seeds, numbers, and the objective section."""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path
from typing import Any

import yaml

from rlpretrain.config import ConfigError, plain
from rlpretrain.config.io import read_mapping, section


def path(text: str) -> str:
    """A path with `~` expanded: a shell does not expand that of `--out=~/x`."""
    return os.path.expanduser(text)


def seed(text: str) -> int:
    """A seed that numpy, torch and vLLM all take."""
    if not text.isascii() or not text.isdigit() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"a seed is a whole number from 0 to {2**32 - 1}, got '{text}'")
    return int(text)


def count(text: str) -> int:
    """A whole number from 1 on."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got '{text}'")
    return int(text)


def port(text: str) -> int:
    """A port; 0 for any that is free."""
    if not text.isascii() or not text.isdigit() or int(text) >= 2**16:
        raise argparse.ArgumentTypeError(f"a port is a whole number from 0 to {2**16 - 1}, got '{text}'")
    return int(text)


def amount(text: str) -> float:
    """A finite number above 0."""
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not 0 < found < math.inf:
        raise argparse.ArgumentTypeError(f"expected a finite number above 0, got '{text}'")
    return found


def objective_section(text: str) -> Any:
    """The objective section from a name, YAML, or a YAML file with the section or a whole configuration."""
    from rlpretrain.objectives import available, config_of

    file = Path(text).expanduser()
    if text not in available() and (file.suffix in (".yaml", ".yml") or file.is_file()):
        if not file.is_file():
            raise ConfigError(f"--objective {text}: there is no such file")
        found = _of_file(read_mapping(file), file)
    else:
        try:
            found = plain.read(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"--objective {text} is not YAML: {plain.where_and_why(error)}") from None
    if not isinstance(found, dict | str) or not found:
        if isinstance(found, dict):
            return {}
        raise ConfigError(
            f"--objective {text}: expected a name, fields as "
            "'{name: rlp, positions: random}', or a YAML file"
        )
    return section({"name": found} if isinstance(found, str) else found, config_of)


def _of_file(values: dict[str, Any], file: Path) -> Any:
    """The section of a run's configuration, or the whole file where it holds nothing else."""
    if "objective" in values:
        return values["objective"]
    if {"model", "data"} & set(values):
        raise ConfigError(f"--objective {file}: this configuration has no objective section")
    return values
