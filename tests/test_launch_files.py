"""The launch files of examples/cluster: shells can read them, and their train commands pass a dry run."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from rlpretrain.cli import main
from tests.builders.processes import ROOT

CLUSTER = ROOT / "examples" / "cluster"
SCRIPTS = ("slurm.sbatch", "ray_job.sh", "try_on_one_machine.sh")


def script_of(name: str) -> str:
    """The shell commands of a launch file."""
    text = (CLUSTER / name).read_text()
    return yaml.safe_load(text)["run"] if name.endswith(".yaml") else text


def train_arguments(name: str) -> list[str]:
    """What follows `rlpretrain.cli` in the launch file's train command."""
    joined = script_of(name).replace("\\\n", " ")
    (command,) = re.findall(r"-m rlpretrain\.cli (train .*)", joined)
    return shlex.split(command)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_shell_can_read_it(name):
    done = subprocess.run(["bash", "-n", CLUSTER / name], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_skypilot_keys():
    """Those that SkyPilot's specification of tasks has, and a script that a shell can read."""
    task = yaml.safe_load((CLUSTER / "skypilot.yaml").read_text())
    assert task.keys() <= {"name", "resources", "workdir", "num_nodes", "file_mounts", "envs", "setup", "run"}
    for part in ("setup", "run"):
        done = subprocess.run(["bash", "-n"], input=task[part], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name, ranks", [("slurm.sbatch", 16), ("skypilot.yaml", 8), ("ray_job.sh", 8)])
def test_the_train_command_passes_a_dry_run(name, ranks, monkeypatch, capsys):
    """It prints the memory of a rank and what it receives from the others."""
    arguments = train_arguments(name)
    at = arguments.index("--resume")
    assert arguments[at : at + 2] == ["--resume", "auto"]
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    assert main([*arguments[:at], *arguments[at + 2 :], "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert f"Memory of a rank of {ranks}" in out and "A rank receives in a step" in out
    assert "gathered weights" in out


def test_the_readme_names_every_file():
    readme = (CLUSTER / "README.md").read_text()
    assert all(f"`{path.name}`" in readme for path in Path(CLUSTER).iterdir() if path.name != "README.md")
