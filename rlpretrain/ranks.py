"""The processes (ranks) of a run: one, or several started by torchrun, deepspeed or accelerate."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from rlpretrain.config import ConfigError

PATIENCE = timedelta(hours=1)
"""How long ranks wait for each other. It must exceed any wait for an engine; NCCL's ten minutes do not."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process's rank, the number of processes, and its device."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def first(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def sum(self, values: list[float]) -> list[float]:
        """Return element-wise sums over all ranks, in float64."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, values: list[float]) -> list[float]:
        """Return element-wise maxima over all ranks."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier()

    def synchronize(self) -> None:
        """Wait until a GPU has done its work, so that times of stages are right."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _reduce(self, values: list[float], op: Any) -> list[float]:
        if self.size == 1:
            return list(values)
        device = self.device if dist.get_backend() == "nccl" else "cpu"
        reduced = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(reduced, op)
        return reduced.tolist()


def join(device: str = "auto") -> Ranks:
    """Join the processes that a launcher started (RANK, WORLD_SIZE, MASTER_ADDR, ...), or run as one."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    rank = int(os.environ.get("RANK", 0))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    torch_device = _resolve_device(device, local_rank)
    if torch_device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # transformers imports deepspeed if it is installed
    if torch_device.type == "cuda":
        torch.cuda.set_device(torch_device)
        # it plans anew for each shape, and shapes change all the time (docs/gpu.md)
        torch.backends.cuda.enable_cudnn_sdp(False)
    if size > 1 and not dist.is_initialized():
        dist.init_process_group(_backend(torch_device), rank=rank, world_size=size, timeout=PATIENCE)
    return Ranks(rank, size, torch_device)


def is_gpu(device: str) -> bool:
    """Whether a setting `device` means an NVIDIA GPU on this machine."""
    return device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())


def _resolve_device(device: str, local_rank: int) -> torch.device:
    """Return the torch device of a setting `device`, with its number; ConfigError if there is none."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch_device = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"device '{device}' is not one of auto, cpu, cuda, cuda:N") from None
    if torch_device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device '{device}': torch {torch.__version__} finds no CUDA device")
    if torch_device.type == "cuda" and torch_device.index is None:  # torch.cuda.set_device needs the number
        return torch.device("cuda", local_rank)
    return torch_device


def _backend(device: torch.device) -> str:
    """Return the communication backend of torch.distributed for a device."""
    return "nccl" if device.type == "cuda" else "gloo"


def ensure_group(ranks: Ranks) -> None:
    """Make a process group and set LOCAL_RANK even for a single process: DeepSpeed needs both."""
    os.environ.setdefault("LOCAL_RANK", "0")
    if not dist.is_initialized():
        # documented, though not in __all__
        store = torch.distributed.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(_backend(ranks.device), store=store, rank=0, world_size=1)
