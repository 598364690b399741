"""The processes of a run: one, or several started by torchrun, deepspeed or accelerate."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from rlpretrain.config import ConfigError

PATIENCE = timedelta(hours=1)
"""How long ranks wait for each other: longer than any wait for an engine, NCCL's own ten minutes are not."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among its peers."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, values: list[float]) -> list[float]:
        """Element-wise sums over all ranks, in float64."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, values: list[float]) -> list[float]:
        """Element-wise maxima over all ranks."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        out: list[Any] = [None] * self.size
        dist.all_gather_object(out, value)
        return out

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def _reduce(self, values: list[float], op: Any) -> list[float]:
        if self.size == 1:
            return list(values)
        t = torch.tensor(
            values, dtype=torch.float64, device=self.device if dist.get_backend() == "nccl" else "cpu"
        )
        dist.all_reduce(t, op)
        return t.tolist()


def join(device: str = "auto") -> Ranks:
    """Join the processes that a launcher started (RANK, WORLD_SIZE, MASTER_ADDR, ...), or be alone."""
    size, rank, local = (
        int(os.environ.get(k, d)) for k, d in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0))
    )
    if device == "auto":
        device = f"cuda:{local}" if torch.cuda.is_available() else "cpu"
    try:
        where = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"device '{device}' is none of auto, cpu, cuda, cuda:N") from None
    if where.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device '{device}': torch {torch.__version__} sees no CUDA device here")
    if where.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # transformers imports deepspeed where it is installed
    if where.type == "cuda":
        torch.cuda.set_device(where)
    if size > 1 and not dist.is_initialized():
        dist.init_process_group(
            "nccl" if where.type == "cuda" else "gloo", rank=rank, world_size=size, timeout=PATIENCE
        )
    return Ranks(rank, size, where)


def ensure_group(ranks: Ranks) -> None:
    """A process group even for one process, and a LOCAL_RANK: DeepSpeed wants both."""
    os.environ.setdefault("LOCAL_RANK", "0")
    if not dist.is_initialized():
        backend = "nccl" if ranks.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
