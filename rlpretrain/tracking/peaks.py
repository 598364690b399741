"""The peak of a device: operations a second of matrix products in dense bfloat16.

The numbers are those of NVIDIA's data sheets without sparsity. No card was asked for its name: docs/gpu.md.
"""

from __future__ import annotations

import re

import torch

PEAKS: dict[str, float] = {
    r"B200": 2250e12,
    r"H200": 989e12,
    r"H200 NVL": 835e12,
    r"GH200 .*": 989e12,
    r"H100 (SXM\w* )?\d+GB HBM3": 989e12,
    r"H100 PCIe": 756e12,
    r"H100 NVL": 835e12,
    r"A100[- ].*": 312e12,
    r"L40S": 362e12,
    r"GeForce RTX 4090": 165e12,
}
"""Patterns of the names that torch.cuda.get_device_name gives, and the peaks."""


def peak_of(name: str) -> float | None:
    """Return the peak of a GPU by its name; None for an unknown one, and for a slice of one (MIG).

    >>> peak_of("NVIDIA H100 80GB HBM3"), peak_of("NVIDIA A100-SXM4-40GB MIG 1g.5gb")
    (989000000000000.0, None)
    """
    short = name.removeprefix("NVIDIA ")
    if " MIG " in short:
        return None
    return next((peak for pattern, peak in PEAKS.items() if re.fullmatch(pattern, short)), None)


def find_peak(device: torch.device | str, given: float | None = None) -> float | None:
    """Return the peak of a device: the `given` one, or that of its name; None on a CPU."""
    if given is not None:
        return given
    device = torch.device(device)
    return peak_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
