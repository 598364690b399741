"""`rlpretrain doctor` says what is wrong, and that nothing is wrong where it is not."""

from __future__ import annotations

import builtins
import os
import sys
from pathlib import Path

import pytest

from rlpretrain.tools import doctor


@pytest.fixture(scope="module")
def checks() -> dict[str, doctor.Check]:
    """The report of the environment that the tests run in, taken once."""
    return {check.name: check for check in doctor.report()}


def test_this_environment_is_healthy(checks):
    assert [check for check in checks.values() if check.status == "fail"] == []
    assert {"python", "platform", "cpu", "memory", "device", "torchvision", "disk"} <= set(checks)
    assert {*doctor.CORE, *doctor.EXTRAS, "rewards", "rollout"} <= set(checks)
    assert all(check.found for check in checks.values())


def test_extras_have_a_version_or_the_line_that_installs_them(checks):
    for name in doctor.EXTRAS:
        check = checks[name]
        assert check.found[0].isdigit() or f'pip install "rlpretrain[{name}' in check.advice


def put(folder: Path, name: str, text: str) -> None:
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(text)


def test_a_broken_torchvision_is_found(tmp_path, monkeypatch):
    put(tmp_path, "torchvision", "raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (check,) = doctor.torchvision()
    assert check.status == "fail" and "torchvision::nms" in check.found
    assert "pip uninstall torchvision" in check.advice


def test_a_broken_deepspeed_is_found(tmp_path, monkeypatch):
    put(tmp_path, "deepspeed", "raise ImportError('no good')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(doctor, "_version", {"deepspeed": "1.0"}.get)
    check = doctor.extras()[0]
    assert (check.name, check.status) == ("deepspeed", "fail") and "no good" in check.found


def test_somebody_elses_rewards_is_found(tmp_path, monkeypatch):
    put(tmp_path, "rewards", "")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "rewards", raising=False)
    rewards, rollout = doctor.packages()
    assert rewards.status == "fail" and str(tmp_path) in rewards.found and "sys.path" in rewards.advice
    assert rollout.status == "ok"


@pytest.mark.parametrize(
    ("cuda", "gpu", "status", "found"),
    [
        (None, False, "ok", "cpu"),
        (None, True, "note", "although there is a GPU"),
        ("13.0", False, "note", "CUDA 13.0"),
    ],
)
def test_torch_and_driver_that_do_not_match(monkeypatch, cuda, gpu, status, found):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(doctor, "_gpu", lambda: gpu)
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    (check,) = doctor.device()
    assert check.status == status and found in check.found and bool(check.advice) == (status != "ok")


def test_a_torch_that_does_not_import(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch")
    real = builtins.__import__

    def broken(name, *args, **kwargs):
        if name == "torch":
            raise OSError("libtorch.so: cannot open shared object file")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", broken)
    (check,) = doctor.device()
    assert check.status == "fail" and "libtorch.so" in check.found


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.rmdir(tmp_path)  # even root cannot write into a folder that is gone
    monkeypatch.setattr(os, "getcwd", lambda: str(tmp_path))
    (check,) = doctor.storage()
    assert check.status == "fail" and str(tmp_path) in check.found


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("note", 0), ("fail", 1)])
def test_the_exit_code(monkeypatch, capsys, status, code):
    monkeypatch.setattr(doctor, "report", lambda: [doctor.Check("thing", status, "[found]", "do [this]")])
    assert doctor.main() == code
    printed = capsys.readouterr().out
    assert "[found]" in printed and "[this]" in printed and status in printed
