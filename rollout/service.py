"""An engine behind HTTP, for trainers elsewhere: vLLM's routes as far as they sample thoughts and take
weights, and `/rollout`.

    rlpretrain serve MODEL --engine vllm --weights-dir /dev/shm/weights

| route | what |
|---|---|
| `POST /rollout` | prompts in the library's own form (`wire.Rollout`); groups come back |
| `POST /v1/completions` | vLLM's form: token ids (or text) in; ids, their log-probs and text out |
| `POST /collective_rpc` | vLLM's `reload_weights` with `weights_path`: safetensors in `--weights-dir` |
| `POST /pause` `/resume` `/reset_prefix_cache` `/update_weight_version` | as in vLLM |
| `GET /is_paused` `/weight_info` | as in vLLM |
| `GET /v1/models` `/version` `/health` `/metrics` | the model, versions, health, and Prometheus metrics |

`rollout.vllm_server.VLLMServerEngine` is a client of it. Nothing is unpickled, no route takes code, no error
holds file content.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Coroutine, MutableMapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import prometheus_client as prometheus
from fastapi import FastAPI, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic_core import to_json
from starlette.exceptions import HTTPException as StarletteHTTPException

from rollout.engine import check_request
from rollout.guard import Guard, problem
from rollout.types import FinishReason, Group, Position, Prompt, SamplingParams, Thought
from rollout.weights import Parameter, complete, read_weights
from rollout.wire import Completion, Limits, Mark, Reload, Rollout

SAMPLING = ("/rollout", "/v1/completions")
NOT_HERE = "this service was started without a folder for weights (--weights-dir)"


@dataclass(frozen=True)
class Served:
    """What is behind the service: an engine whose `sample` lets others run meanwhile, and the facts of its
    model.
    """

    engine: Any
    name: str
    max_model_len: int
    vocabulary: float = math.inf
    parameters: Sequence[Parameter] = ()  # what new weights must be: `weights.parameters_of`
    tokenizer: Any = None
    eos_ids: tuple[int, ...] = ()
    version: str = "unknown"  # of this library


class Service:
    """The state behind the routes: the engine, the gate that `/pause` closes, and the counters."""

    def __init__(self, served: Served, limits: Limits, weights_dir: Path | None):
        self.served, self.limits = served, limits
        self.engine = served.engine
        self.weights_dir = weights_dir.resolve() if weights_dir else None
        self.mark: str | None = None
        self.open = asyncio.Event()
        self.open.set()
        self.changing = asyncio.Lock()
        self.running: set[asyncio.Task[Any]] = set()
        self.registry = prometheus.CollectorRegistry()
        make = {"registry": self.registry, "namespace": "rlpretrain"}
        self.requests = prometheus.Counter(
            "requests", "Answers by route and status", ["route", "status"], **make
        )
        self.seconds = prometheus.Histogram(
            "request_seconds",
            "Time of sampling requests",
            ["route"],
            **make,
            buckets=(0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600),
        )
        self.prompt_tokens = prometheus.Counter("prompt_tokens", "Prompt tokens read", **make)
        self.thoughts = prometheus.Counter(
            "thoughts", "Thoughts sampled, by how they ended", ["finish_reason"], **make
        )
        self.tokens = prometheus.Counter("thought_tokens", "Thought tokens sampled", **make)
        self.syncs = prometheus.Counter("weight_syncs", "Weights loaded", **make)
        self.sync_seconds = prometheus.Histogram(
            "weight_sync_seconds", "Time to load weights, draining included", **make
        )
        in_flight = prometheus.Gauge("requests_in_flight", "Sampling requests being answered", **make)
        in_flight.set_function(lambda: len(self.running))
        version = prometheus.Gauge("policy_version", "Version of the weights", **make)
        version.set_function(lambda: self.engine.version)

    async def sample(
        self,
        request: Request,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        n: int,
        seeds: Sequence[int],
    ) -> list[list[Thought]]:
        """Check, wait for the gate, sample; given up when the client goes away or the time is over."""
        for name, given, most in (
            ("prompts", len(prompts), self.limits.prompts),
            ("n", n, self.limits.n),
            ("prompts x n", len(prompts) * n, self.limits.thoughts),
        ):
            if given > most:
                raise HTTPException(400, f"{name} is {given}, and the limit is {most}")
        try:
            check_request(
                prompts,
                params,
                n,
                seeds,
                vocabulary=self.served.vocabulary,
                most=self.served.max_model_len,
                strings=self.served.tokenizer is not None,
            )
        except ValueError as error:
            raise HTTPException(400, str(error)) from None
        begin = time.perf_counter()
        groups = await self._while_there(request, self._sample(prompts, params, n, seeds))
        if groups is None:  # the service was paused
            groups = [
                [Thought((), (), FinishReason.ABORT, self.engine.version, seed + k) for k in range(n)]
                for seed in seeds
            ]
        self.seconds.labels(request.url.path).observe(time.perf_counter() - begin)
        self.prompt_tokens.inc(sum(len(p.token_ids) for p in prompts))
        for thought in (t for group in groups for t in group):
            self.thoughts.labels(str(thought.finish_reason)).inc()
            self.tokens.inc(len(thought.token_ids))
        return groups

    async def _sample(self, *what: Any) -> list[list[Thought]]:
        while not self.open.is_set():
            await self.open.wait()
        task = asyncio.ensure_future(self.engine.sample(*what))
        self.running.add(task)
        try:
            return await task
        finally:
            self.running.discard(task)

    async def _while_there(self, request: Request, work: Coroutine[Any, Any, Any]) -> Any:
        """What the work gives, None if it was aborted."""
        task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
        try:
            await asyncio.wait(
                (task, gone), timeout=self.limits.request_s, return_when=asyncio.FIRST_COMPLETED
            )
            if task.done():
                return None if task.cancelled() else task.result()
            if gone.done():
                raise HTTPException(499, "the client went away")
            raise HTTPException(504, f"no thoughts within {self.limits.request_s:g} s")
        finally:
            task.cancel()
            gone.cancel()

    async def pause(self, abort: bool) -> None:
        """Close the gate; end what runs, or wait for it."""
        self.open.clear()
        while self.running:
            for task in tuple(self.running) if abort else ():
                task.cancel()
            await asyncio.wait(set(self.running), timeout=1.0)

    async def reload(self, given: str) -> None:
        """Load weights from a place under the weights folder; HTTPException for every other."""
        where = self._inside(given)
        begin = time.perf_counter()
        async with self.changing:
            try:
                state = complete(await asyncio.to_thread(read_weights, where), self.served.parameters)
                self.mark = None
                await self._sync(lambda: state.items(), self.engine.version + 1)
            except ValueError as error:
                raise HTTPException(400, str(error)) from None
        self.syncs.inc()
        self.sync_seconds.observe(time.perf_counter() - begin)

    def _inside(self, given: str) -> Path:
        if self.weights_dir is None:
            raise HTTPException(403, NOT_HERE)
        try:
            path = (self.weights_dir / given).resolve(strict=True)
            files = [path, *(f.resolve() for f in path.glob("*.safetensors"))]
        except (OSError, ValueError, RuntimeError):
            files = []
        if not files or not all(
            f.is_relative_to(self.weights_dir) for f in files
        ):  # links that lead out are out
            raise HTTPException(
                403, "weights_path is not in the folder for weights that this service was started with"
            )
        return files[0]

    async def _sync(self, *what: Any) -> None:
        work = self.engine.sync
        await (work(*what) if asyncio.iscoroutinefunction(work) else asyncio.to_thread(work, *what))

    def health(self) -> dict[str, Any]:
        """What the engine says of itself, and whether the gate is open."""
        return self.engine.health() | {"paused": not self.open.is_set(), "in_flight": len(self.running)}


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def create_app(
    served: Served, *, limits: Limits | None = None, weights_dir: Path | None = None, token: str | None = None
) -> FastAPI:
    """The application; `token` is asked of every route but `/health`."""
    limits = limits or Limits()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.service = Service(served, limits, weights_dir)
        yield
        await asyncio.to_thread(served.engine.close)

    app = FastAPI(title="rlpretrain rollout service", version=served.version, lifespan=lifespan)
    app.add_middleware(Guard, token=token, limits=limits, sampling=SAMPLING, count=_count)
    _errors(app)
    _sampling_routes(app, served)
    _weight_routes(app)
    _facts(app, served)
    return app


def _count(scope: MutableMapping[str, Any], status: int) -> None:
    route = getattr(scope.get("route"), "path", "other")
    scope["app"].state.service.requests.labels(route, str(status)).inc()


def _sampling_routes(app: FastAPI, served: Served) -> None:
    tokenizer = served.tokenizer

    @app.post("/rollout")
    async def rollout(body: Rollout, request: Request) -> Response:
        """Groups of thoughts, in the library's own form."""
        service: Service = request.app.state.service
        count = len(body.prompts)
        if body.positions is not None and len(body.positions) != count:
            raise HTTPException(
                400, f"one position a prompt: got {count} prompts and {len(body.positions)} positions"
            )
        prompts = [p.prompt() for p in body.prompts]
        found = await service.sample(request, prompts, body.params.params(), body.n, body.seeds)
        positions = (
            [p.position() for p in body.positions]
            if body.positions is not None
            else [Position("", len(p.token_ids), p.token_ids, ()) for p in prompts]
        )
        groups = [
            asdict(
                Group(
                    f"{p.document_id}@{p.index}:{seed:x}", p, q, tuple(thoughts), thoughts[0].policy_version
                )
            )
            for p, q, thoughts, seed in zip(positions, prompts, found, body.seeds, strict=True)
        ]
        return _json({"groups": groups, "weight_version": service.mark})

    @app.post("/v1/completions")
    async def completions(body: Completion, request: Request) -> Response:
        """vLLM's completions. Choice k of prompt i has index i·n + k, as there."""
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
        found = await service.sample(request, prompts, params, body.n, [body.seed] * len(prompts))
        choices = [
            _choice(i * body.n + k, thought, prompt, body, tokenizer)
            for i, (prompt, thoughts) in enumerate(zip(prompts, found, strict=True))
            for k, thought in enumerate(thoughts)
        ]
        read, said = (
            sum(len(p.token_ids) for p in prompts),
            sum(len(t.token_ids) for group in found for t in group),
        )
        usage = {"prompt_tokens": read, "completion_tokens": said, "total_tokens": read + said}
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


def _weight_routes(app: FastAPI) -> None:
    @app.post("/pause")
    async def pause(
        request: Request,
        mode: Literal["abort", "wait"] = "abort",
        clear_cache: Annotated[bool, Query()] = True,
    ) -> dict[str, str]:
        """Take nothing new; abort what runs, or wait for it. `clear_cache` is accepted for vLLM's sake: a
        sync empties it.
        """
        await request.app.state.service.pause(mode == "abort")
        return {"status": "paused"}

    @app.post("/resume")
    async def resume(request: Request) -> dict[str, str]:
        """Go on."""
        request.app.state.service.open.set()
        return {"status": "resumed"}

    @app.get("/is_paused")
    async def is_paused(request: Request) -> dict[str, bool]:
        """Whether new requests wait."""
        return {"is_paused": not request.app.state.service.open.is_set()}

    @app.post("/collective_rpc")
    async def collective_rpc(body: Reload, request: Request) -> dict[str, list[None]]:
        """Load weights: `{"method": "reload_weights", "kwargs": {"weights_path": "..."}}`, the only call
        there is.
        """
        await request.app.state.service.reload(body.kwargs.weights_path)
        return {"results": [None]}

    @app.post("/reset_prefix_cache")
    async def reset_prefix_cache(request: Request) -> dict[str, str]:
        """Forget the contexts that were read."""
        engine = request.app.state.service.engine
        if hasattr(engine, "reset_prefix_cache"):
            await asyncio.to_thread(engine.reset_prefix_cache)
        return {"status": "reset"}

    @app.post("/update_weight_version")
    async def update_weight_version(body: Mark, request: Request) -> dict[str, str]:
        """Name the present weights."""
        request.app.state.service.mark = body.new_version
        return {"status": "updated"}

    @app.get("/weight_info")
    async def weight_info(request: Request) -> dict[str, str | None]:
        """The name that the trainer gave the present weights; null after a start or a load that was not
        named yet.
        """
        return {"weight_version": request.app.state.service.mark}


def _facts(app: FastAPI, served: Served) -> None:
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
        """Of this library; `server` tells it from vLLM's own server."""
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


def _errors(app: FastAPI) -> None:
    """Every error in one form, without what the client sent: it may be large, or no text at all."""

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        found = error.errors()
        words = [
            f"{'.'.join(ascii(part).strip(chr(39)) for part in e['loc'])[:200]}: {e['msg'][:200]}"
            for e in found[:5]
        ]
        return problem(400, "; ".join(words) + (f" and {len(found) - 5} more" if len(found) > 5 else ""))

    @app.exception_handler(StarletteHTTPException)
    async def refused(_: Request, error: StarletteHTTPException) -> Response:
        return problem(error.status_code, str(error.detail), error.headers)


def _json(content: Any) -> Response:
    return Response(to_json(content), media_type="application/json")


def _choice(index: int, thought: Thought, prompt: Prompt, body: Completion, tokenizer: Any) -> dict[str, Any]:
    """A thought as vLLM's choice. `seed` is ours: it draws this thought again."""
    ids = list(thought.token_ids)
    text = (
        tokenizer.decode(ids, skip_special_tokens=body.skip_special_tokens) if tokenizer is not None else ""
    )
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
