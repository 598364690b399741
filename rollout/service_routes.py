"""The routes of the rollout service; `service.py` has the table of them."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Annotated, Any, Literal

import prometheus_client as prometheus
from fastapi import FastAPI, HTTPException, Query, Request, Response
from fastapi.responses import JSONResponse
from pydantic_core import to_json

from rollout.guard import problem
from rollout.service_state import Served, Service
from rollout.types import FinishReason, Group, Position, Prompt, Thought
from rollout.wire import Completion, Mark, Reload, Rollout


def add_sampling_routes(app: FastAPI, served: Served) -> None:
    """`/rollout` and `/v1/completions`."""
    tokenizer = served.tokenizer

    @app.post("/rollout")
    async def rollout(body: Rollout, request: Request) -> Response:
        """Groups of thoughts, in the library's form."""
        service: Service = request.app.state.service
        count = len(body.prompts)
        if body.positions is not None and len(body.positions) != count:
            raise HTTPException(
                400, f"one position a prompt: got {count} prompts and {len(body.positions)} positions"
            )
        prompts = [p.prompt() for p in body.prompts]
        sampled = await service.sample(request, prompts, body.params.params(), body.n, body.seeds)
        if body.positions is not None:
            positions = [p.position() for p in body.positions]
        else:
            positions = [Position("", len(p.token_ids), p.token_ids, ()) for p in prompts]
        groups = []
        for position, prompt, thoughts, seed in zip(positions, prompts, sampled, body.seeds, strict=True):
            name = f"{position.document_id}@{position.index}:{seed:x}"
            groups.append(Group(name, position, prompt, tuple(thoughts), thoughts[0].policy_version))
        return _json({"groups": [asdict(group) for group in groups], "weight_version": service.mark})

    @app.post("/v1/completions")
    async def completions(body: Completion, request: Request) -> Response:
        """vLLM's completions. Choice k of prompt i has index i·n + k, as in vLLM."""
        service: Service = request.app.state.service
        if body.model not in (None, served.name):
            return problem(
                404, f"the model {ascii(body.model)[:200]} is not served here; /v1/models says what is"
            )
        try:
            prompts = body.prompts(tokenizer.encode if tokenizer is not None else None)
        except ValueError as error:
            raise HTTPException(400, str(error)) from None
        params = body.params(served.eos_ids)
        sampled = await service.sample(request, prompts, params, body.n, [body.seed] * len(prompts))
        choices = [
            _choice(i * body.n + k, thought, prompt, body, tokenizer)
            for i, (prompt, thoughts) in enumerate(zip(prompts, sampled, strict=True))
            for k, thought in enumerate(thoughts)
        ]
        read = sum(len(prompt.token_ids) for prompt in prompts)
        written = sum(len(thought.token_ids) for thoughts in sampled for thought in thoughts)
        usage = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
        return _json(
            {
                "id": f"cmpl-{id(body):x}",
                "object": "text_completion",
                "created": int(time.time()),
                "model": served.name,
                "choices": choices,
                "usage": usage,
            }
        )


def add_weight_routes(app: FastAPI) -> None:
    """The routes that pause sampling, load weights and name them."""

    @app.post("/pause")
    async def pause(
        request: Request,
        mode: Literal["abort", "wait"] = "abort",
        clear_cache: Annotated[bool, Query()] = True,
    ) -> dict[str, str]:
        """Start no new request; abort those that run, or wait for them.

        `clear_cache` is accepted for compatibility with vLLM: every sync empties the cache.
        """
        await request.app.state.service.pause(mode == "abort")
        return {"status": "paused"}

    @app.post("/resume")
    async def resume(request: Request) -> dict[str, str]:
        """Start the requests that wait, and new ones."""
        request.app.state.service.open.set()
        return {"status": "resumed"}

    @app.get("/is_paused")
    async def is_paused(request: Request) -> dict[str, bool]:
        """Whether new requests wait."""
        return {"is_paused": not request.app.state.service.open.is_set()}

    @app.post("/collective_rpc")
    async def collective_rpc(body: Reload, request: Request) -> dict[str, list[None]]:
        """Load weights; the body is `{"method": "reload_weights", "kwargs": {"weights_path": "..."}}`."""
        await request.app.state.service.reload(body.kwargs.weights_path)
        return {"results": [None]}

    @app.post("/reset_prefix_cache")
    async def reset_prefix_cache(request: Request) -> dict[str, str]:
        """Empty the prefix cache."""
        await request.app.state.service.reset_prefix_cache()
        return {"status": "reset"}

    @app.post("/update_weight_version")
    async def update_weight_version(body: Mark, request: Request) -> dict[str, str]:
        """Name the present weights."""
        request.app.state.service.mark = body.new_version
        return {"status": "updated"}

    @app.get("/weight_info")
    async def weight_info(request: Request) -> dict[str, str | None]:
        """The trainer's name for the present weights; null until it has named them."""
        return {"weight_version": request.app.state.service.mark}


def add_fact_routes(app: FastAPI, served: Served) -> None:
    """The routes that describe the service."""

    @app.get("/health")
    async def health(request: Request) -> JSONResponse:
        """200 while the engine works, 503 once it does not; no token needed."""
        facts = request.app.state.service.health()
        return JSONResponse(facts, 503 if facts.get("closed") or facts.get("failed") else 200)

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        """Prometheus' text format."""
        registry = request.app.state.service.registry
        return Response(prometheus.generate_latest(registry), media_type=prometheus.CONTENT_TYPE_LATEST)

    @app.get("/version")
    async def version() -> dict[str, str]:
        """The version of this library; `server` tells this service from vLLM's server."""
        return {"version": served.version, "server": "rlpretrain"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The one model."""
        card = {
            "id": served.name,
            "object": "model",
            "owned_by": "rlpretrain",
            "max_model_len": served.max_model_len,
        }
        return {"object": "list", "data": [card]}


def _json(content: Any) -> Response:
    return Response(to_json(content), media_type="application/json")


def _choice(index: int, thought: Thought, prompt: Prompt, body: Completion, tokenizer: Any) -> dict[str, Any]:
    """A thought as vLLM's choice. `seed`, which vLLM does not have, draws this thought again."""
    ids = list(thought.token_ids)
    text = ""
    if tokenizer is not None:
        text = tokenizer.decode(ids, skip_special_tokens=body.skip_special_tokens)
    reasons = {FinishReason.LENGTH: "length", FinishReason.ABORT: "abort"}
    stop: int | str | None = None
    if thought.finish_reason is FinishReason.CLOSE:
        strings = [s for s in prompt.stop_strings if s in text] or list(prompt.stop_strings)
        stop = ids[-1] if ids[-1] in prompt.stop_ids else strings[0]
    logprobs = {
        "token_logprobs": list(thought.behaviour_logps),
        "tokens": [f"token_id:{i}" for i in ids],
        "text_offset": [],
        "top_logprobs": [],
    }
    return {
        "index": index,
        "text": text,
        "finish_reason": reasons.get(thought.finish_reason, "stop"),
        "stop_reason": stop,
        "logprobs": logprobs if body.logprobs is not None else None,
        "token_ids": ids if body.return_token_ids else None,
        "seed": thought.seed,
    }
