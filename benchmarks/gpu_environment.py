"""The part of `benchmarks.gpu` that describes the machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess

import torch

from benchmarks.gpu_shapes import Cell, Report, Settings, measuring, peak_of


def measure_environment(settings: Settings, report: Report) -> None:
    """The machine and the versions."""
    cell = Cell("machine")
    with measuring(cell):
        cell.values = {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "cores": os.cpu_count(),
            "token_budget": settings.token_budget,
        }
        for name in ("transformers", "numpy", "triton", "tokenizers", "datasets"):
            try:
                cell.values[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                cell.values[name] = None
        cell.values["device"], cell.values["peak"] = "cpu", settings.peak
        if settings.device.startswith("cuda"):
            properties = torch.cuda.get_device_properties(settings.device)
            cell.values["device"] = properties.name
            cell.values["capability"] = f"{properties.major}.{properties.minor}"
            cell.values["memory_gib"] = properties.total_memory / 2**30
            cell.values["peak"] = settings.peak or peak_of(properties.name)
        if shutil.which("nvidia-smi"):
            query = [
                "nvidia-smi",
                "--query-gpu=driver_version,clocks.max.sm,power.limit",
                "--format=csv,noheader",
            ]
            answer = subprocess.run(query, capture_output=True, text=True, timeout=20)
            cell.values["driver, clock, power"] = answer.stdout.strip()
    report(cell)
