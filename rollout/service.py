"""An engine behind HTTP: `/rollout`, and those routes of vLLM that sample thoughts and take weights.

    rlpretrain serve MODEL --engine vllm --weights-dir /dev/shm/weights

| route | what |
|---|---|
| `POST /rollout` | prompts in the library's own form (`wire.Rollout`); groups come back |
| `POST /v1/completions` | vLLM's form: token ids (or text) in; ids, their log-probs and text out |
| `POST /collective_rpc` | vLLM's `reload_weights` with `weights_path`: safetensors in `--weights-dir` |
| `POST /pause` `/resume` `/reset_prefix_cache` `/update_weight_version` | as in vLLM |
| `GET /is_paused` `/weight_info` | as in vLLM |
| `GET /v1/models` `/version` `/health` `/metrics` | the model, versions, health, and Prometheus metrics |

`rollout.vllm_server.VLLMServerEngine` is a client of it. The service unpickles nothing, takes no code, and
puts no file content into errors.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, MutableMapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException as StarletteHTTPException

from rollout.guard import Guard, problem
from rollout.service_routes import add_fact_routes, add_sampling_routes, add_weight_routes
from rollout.service_state import Served, Service
from rollout.wire import Limits

__all__ = ["Served", "create_app"]

SAMPLING = ("/rollout", "/v1/completions")


def create_app(
    served: Served, *, limits: Limits | None = None, weights_dir: Path | None = None, token: str | None = None
) -> FastAPI:
    """The application; every route but `/health` asks for `token`."""
    limits = limits or Limits()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.service = Service(served, limits, weights_dir)
        yield
        await asyncio.to_thread(served.engine.close)

    app = FastAPI(title="rlpretrain rollout service", version=served.version, lifespan=lifespan)
    app.add_middleware(Guard, token=token, limits=limits, sampling=SAMPLING, count=_count)
    _handle_errors(app)
    add_sampling_routes(app, served)
    add_weight_routes(app)
    add_fact_routes(app, served)
    return app


def _count(scope: MutableMapping[str, Any], status: int) -> None:
    route = getattr(scope.get("route"), "path", "other")
    scope["app"].state.service.requests.labels(route, str(status)).inc()


def _handle_errors(app: FastAPI) -> None:
    """Give every error one form, without the client's input, which may be large or not be text."""

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        errors = error.errors()
        message = "; ".join(_in_words(item) for item in errors[:5])
        more = f" and {len(errors) - 5} more" if len(errors) > 5 else ""
        return problem(400, message + more)

    @app.exception_handler(StarletteHTTPException)
    async def refused(_: Request, error: StarletteHTTPException) -> Response:
        return problem(error.status_code, str(error.detail), error.headers)


def _in_words(item: dict[str, Any]) -> str:
    """One error of pydantic: where it is, and what."""
    where = ".".join(ascii(part).strip("'") for part in item["loc"])
    return f"{where[:200]}: {item['msg'][:200]}"
