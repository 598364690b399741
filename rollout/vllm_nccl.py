"""Sends weights over NCCL to vLLM servers on GPUs, with vLLM's trainer side; no files, no pickles.

Start the servers with `--weight-transfer-config '{"backend": "nccl"}'` beside the flags of `vllm_server`.
This path needs CUDA on both sides and has never been run (docs/gpu.md). tests/rollout/test_vllm_nccl.py has
the checks that need no GPU, and the probe after every sync checks this path like any other.

CUDA IPC, vLLM's other backend, is left out on purpose: over HTTP it needs pickles, and within one process
(`vllm_local`) the tensors are passed directly.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping
from typing import Any

import torch


class Source:
    """The present weights as vLLM's trainer side reads them: descriptions, then one tensor at a time."""

    def __init__(self, state: Mapping[str, torch.Tensor], device: torch.device):
        self.state, self.device = state, device

    def describe(self) -> list[Any]:
        """Name, type and shape of every tensor."""
        from vllm.distributed.weight_transfer.base import ParamMeta

        return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self.state.items()]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self.state.items():
            yield name, tensor.to(self.device, non_blocking=True)


class IteratedSource(Source):
    """For vLLM below 0.33, which iterates a source."""

    metadata = Source.describe


class FullSource(Source):
    """For vLLM from 0.33 on, which asks for whole tensors, or for a rank's parts of them."""

    metadata = property(Source.describe)
    iter_full = Source.__iter__

    def implements_iter_full(self) -> bool:
        return True

    def implements_iter_local(self) -> bool:
        return False

    def owned_names(self, rank: int) -> list[str]:
        """The names of the tensors that a rank has: all."""
        return list(self.state)


def make_source(state: Mapping[str, torch.Tensor], device: torch.device) -> Source:
    """The source that the installed vLLM reads."""
    from vllm.distributed.weight_transfer.base import WeightSource

    return (FullSource if hasattr(WeightSource, "iter_full") else IteratedSource)(state, device)


class NCCLTransfer:
    """One server's NCCL group: this process is rank 0, the server's workers are the others.

    `world_size` is the number of the server's workers, `host` the address at which it reaches this process.
    The first `send` makes the group; a server that was restarted needs a new NCCLTransfer. Raises
    RuntimeError without CUDA, ImportError without vLLM's weight transfer.
    """

    def __init__(self, url: str, world_size: int, *, host: str | None = None, timeout: float = 300.0):
        if not torch.cuda.is_available():
            raise RuntimeError(
                "engine.transfer: nccl needs CUDA in the trainer; engine.transfer: file needs none"
            )
        try:
            from vllm.distributed.weight_transfer.clients import HTTPVLLMWeightSyncClient
            from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
        except ImportError as error:
            raise ImportError(
                f"engine.transfer: nccl needs vLLM >= 0.30 beside the trainer too: {error}"
            ) from error
        self.client = HTTPVLLMWeightSyncClient(url, timeout)
        self.source = make_source({}, torch.device("cuda", torch.cuda.current_device()))
        self.info = NCCLTrainerInitInfo(host or socket.gethostname(), _free_port(), world_size + 1, rank=0)
        self._engine: Any = None

    def send(self, state: Mapping[str, torch.Tensor]) -> None:
        """Broadcast all tensors; return when the server has them."""
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerWeightTransferEngine

        self.source.state = state
        if self._engine is None:
            self._engine = NCCLTrainerWeightTransferEngine.trainer_init(
                self.info,
                client=self.client,
                # no subclass of vLLM's, so that this module imports without vLLM
                source=self.source,  # pyright: ignore[reportArgumentType]
            )
        self._engine.send_weights()


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("", 0))
        return s.getsockname()[1]
