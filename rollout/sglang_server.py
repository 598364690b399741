"""Client of one or several SGLang servers, over SGLang's own routes: a stock server is enough.

Start each with

    python -m sglang.launch_server --model-path MODEL --dtype float32 --enable-deterministic-inference \
        --attention-backend triton

Without deterministic inference SGLang ignores seeds. `SGLANG_RETURN_ORIGINAL_LOGPROB` must not be set: it
makes log-probabilities those of temperature 1. The routes that take weights are open to whoever reaches the
server: keep it on a private network, or start it with --api-key.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from rollout.server_engine import ServerEngine
from rollout.servers import EngineUnavailable, Server
from rollout.sglang_routes import SGLangRoutes, UnseededSGLangRoutes

__all__ = ["EngineUnavailable", "SGLangServerEngine"]


class SGLangServerEngine(ServerEngine):
    """Samples from SGLang servers; see `ServerEngine`.

    With `deterministic`, a server that ignores seeds is refused. Top-p and top-k are refused when something
    is sampled. Log-probabilities are those of the temperature, without banned ids.
    """

    kind: ClassVar[str] = "sglang_server"
    routes: type[Server] = SGLangRoutes

    def __init__(self, urls: Sequence[str], *, deterministic: bool = True, **settings: Any) -> None:
        self.routes = SGLangRoutes if deterministic else UnseededSGLangRoutes
        super().__init__(urls, **settings)
        self.block_size = max(server.card.get("page_size", 1) for server in self.servers)
