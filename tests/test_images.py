"""The files of images: what they copy, install and start is there. Building them needs a network."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "images").glob("*.Dockerfile"))


def instructions(file: Path) -> list[tuple[str, str]]:
    """(instruction, rest of the line), without comments."""
    text = file.read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in lines]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_what_an_image_does_exists(file):
    steps = instructions(file)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert steps[0][0] == "FROM"
    assert [words for name, words in steps if name == "ENTRYPOINT"] == ['["rlpretrain"]']
    assert "rlpretrain" in project["scripts"]
    python = re.match(r"python:(3\.\d+)-slim", steps[0][1])
    assert python and project["requires-python"] == ">=3.11" and float(python[1][2:]) >= 11
    for name, words in steps:
        if name == "RUN":
            assert subprocess.run(["bash", "-n", "-c", words]).returncode == 0
            for script, lock in re.findall(r"bash (\S+) (\S+)", words):
                assert (ROOT / script).is_file() and (ROOT / "locks" / f"{lock}.txt").is_file()
            for extras in re.findall(r"\.\[([\w,-]+)\]", words):
                assert set(extras.split(",")) <= set(project["optional-dependencies"])
        assert name in ("FROM", "RUN", "WORKDIR", "COPY", "ENV", "ENTRYPOINT", "CMD")


def test_what_is_left_out_of_an_image_is_not_in_the_repository():
    """Nothing that git tracks is missing in an image."""
    ignored = [line.strip("*/") for line in (ROOT / ".dockerignore").read_text().splitlines()]
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a checkout")
    tops = {Path(name).parts[0] for name in tracked.stdout.splitlines()}
    assert not tops & set(ignored)
