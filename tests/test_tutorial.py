"""The tutorial: its files and commands work as printed, and its own test passes."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from rlpretrain.corpora import dial
from tests.builders.processes import ROOT, alone, python

TEXT = (ROOT / "docs" / "tutorial.md").read_text()
FILES = dict(re.findall(r"^`([\w.]+)`:\n\n```\w+\n(.*?)```", TEXT, re.S | re.M))
COMMANDS = re.findall(r"^\$ (.+)$", TEXT, re.M)


def ran(command: str, folder: Path) -> str:
    """The output of one command of the page."""
    name, *words = command.split()
    assert name in ("rlpretrain", "pytest"), command
    script = str(Path(sys.executable).parent / name)
    done = python(script, *words, folder=folder, environment=alone() | {"COLUMNS": "200"})
    assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout


@pytest.mark.slow
def test_the_tutorial_works_as_printed(tmp_path):
    """With two steps, eight documents, one seed and the suite's base."""
    assert set(FILES) == {"frugal.py", "frugal.yaml", "test_frugal.py", "compare.yaml"}
    dial.write(tmp_path / "corpus", base=1, train=80, held_out=24, held_out_depths=(1, 2))
    (tmp_path / "base").symlink_to(ROOT / "tests" / "data" / "dial_base")
    small = {
        "max_steps: 120": "max_steps: 2",
        "documents: 200": "documents: 8",
        "seeds: [0, 1]": "seeds: [0]",
    }
    for name, text in FILES.items():
        for old, new in small.items():
            text = text.replace(old, new)
        (tmp_path / name).write_text(text)
    said = {command: ran(command, tmp_path) for command in COMMANDS}
    assert "objective.price (frugal:Frugal)" in said["rlpretrain train frugal.yaml --fields"]
    assert "Nats that a token of a thought costs" in said["rlpretrain train frugal.yaml --fields"]
    assert len((tmp_path / "frugal" / "metrics.jsonl").read_text().splitlines()) == 2
    rows = json.loads((tmp_path / "compared" / "results.json").read_text())["methods"]
    assert rows["frugal"]["own"]["number"] == "length" and set(rows) == {"base", "rlp", "frugal"}
    assert any("pytest" in command for command in COMMANDS)
