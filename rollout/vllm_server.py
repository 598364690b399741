"""Client of one or several vLLM servers, over vLLM's own routes: a stock server is enough.

Start each with

    VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs --generation-config vllm \
        --dtype float32 --max-num-seqs 256

(docs/rollout.md has the command for the CPU build). The dev mode opens the routes that weights need; keep
such a server on a private network.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from rollout.server_engine import ServerEngine
from rollout.servers import EngineUnavailable, Server
from rollout.vllm_routes import VLLMRoutes

__all__ = ["EngineUnavailable", "VLLMServerEngine"]


class VLLMServerEngine(ServerEngine):
    """Samples from vLLM servers or `rlpretrain serve`; see `ServerEngine`.

    `transfer` nccl sends weights from GPU to GPU (see `vllm_nccl`); servers reach this process at
    `master_address`. changes sends what changed since the last sync, to `rlpretrain serve`. With
    `in_flight`, thoughts in flight wait while weights are loaded and go on with them: the server reads again
    what they have, and their later ids carry the new version (`Thought.updates`).
    """

    kind: ClassVar[str] = "vllm_server"
    routes: type[Server] = VLLMRoutes

    def __init__(
        self, urls: Sequence[str], *, block_size: int | None = None, transfer: str = "file", **settings: Any
    ) -> None:
        if transfer == "nccl" and not torch.cuda.is_available():
            raise ValueError(
                "engine.transfer: nccl needs CUDA in the trainer; engine.transfer: file needs none"
            )
        largest = 128  # that vLLM's servers choose by themselves
        super().__init__(urls, block_size=block_size or largest, transfer=transfer, **settings)
