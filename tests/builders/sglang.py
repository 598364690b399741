"""An in-process server that answers as SGLang's recorded contract says, and samples with transformers.

It stands for a server of SGLang, of which none has run in this project. It checks every request and
every answer of its own against tests/data/sglang_contract.json: fields that SGLang does not have, and other
types, are errors. So a client that passes knows no field that the contract lacks.
"""

from __future__ import annotations

import asyncio
import json
import threading
import typing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, create_model

from rollout import FinishReason, HFEngine, Prompt, SamplingParams, Thought
from rollout.weights import read_weights

CONTRACT = json.loads((Path(__file__).parents[1] / "data" / "sglang_contract.json").read_text())
STRICT = ConfigDict(extra="forbid", strict=True)


class Contract:
    """Checks JSON against the recorded fields; pydantic's ValidationError names what differs."""

    def __init__(self, recorded: dict[str, Any]):
        self.recorded, self._known = recorded, {"Any": Any, "int": int, "float": float, "str": str}
        self._known |= {"bool": bool} | {n: getattr(typing, n) for n in ("Optional", "Union", "List", "Dict")}

    def __getitem__(self, name: str) -> Any:
        """The type of a name: a struct, an alias, or, where neither is recorded, anything."""
        if name not in self._known:
            if name == "LogprobEntry":  # a JSON array of its fields
                kinds = [self.kind(text) for text in self.recorded["structs"][name].values()]
                self._known[name] = tuple[tuple(kinds)]  # type: ignore[misc]
            elif name in self.recorded["structs"]:
                self._known[name] = self.struct(name, self.recorded["structs"][name])
            else:
                self._known[name] = self.kind(self.recorded["aliases"].get(name, "Any"))
        return self._known[name]

    def kind(self, text: str) -> Any:
        return eval(text, {"__builtins__": {}}, self)

    def struct(self, name: str, fields: dict[str, str]) -> Any:
        return create_model(
            name,
            __config__=STRICT,
            **{field: (self.kind(kind), None) for field, kind in fields.items()},  # type: ignore[call-overload]
        )

    def check(self, kind: Any, value: Any) -> None:
        TypeAdapter(kind).validate_json(json.dumps(value))

    def request(self, route: str, method: str, body: Any) -> None:
        """Raise ValueError for a route, method or body that SGLang does not have."""
        if method not in self.recorded["routes"].get(route, ()):
            raise ValueError(f"no route {method} {route}")
        if route == "/generate":
            self.check(self["GenerateRequest"], body)
        if route == "/update_weights_from_disk":
            self.check(self.struct("Update", self.recorded["update_weights_from_disk"]["request"]), body)

    def answer(self, route: str, status: int, body: Any) -> None:
        """Raise ValueError for an answer that SGLang would not give."""
        if route == "/generate" and status == 200:
            response = self["GenerateResponse"]
            self.check(list[response], body)
        if route == "/server_info":
            self.check(self.struct("Info", self.recorded["server_info"]), body)
        if route == "/model_info":
            assert set(body) <= set(self.recorded["model_info"]), body
        if route == "/update_weights_from_disk":
            assert set(body) == set(self.recorded["update_weights_from_disk"]["answer"]), body


class SGLangServer:
    """A server of one model. `eos` ends every sample, as the model's own end-of-text id does in SGLang.

    `fault` changes the next answers: abort, two_loads (the weights change while it samples), stale (it says
    that it loaded weights and keeps the old ones), refuse (it cannot load), 503.
    """

    def __init__(self, model: Any, *, eos: int, token: str | None = None, port: int = 0, **info: Any):
        self.model, self.eos, self.token, self.fault = model, eos, token, ""
        self.engine, self.lock = HFEngine(model), threading.Lock()
        self.version: str | None = None
        self.asked: list[tuple[str, Any]] = []
        self.broken: list[str] = []
        self.contract = Contract(CONTRACT)
        self.limit = model.config.max_position_embeddings
        self.info = {
            "version": CONTRACT["version"],
            "served_model_name": "base",
            "page_size": 16,
            "enable_deterministic_inference": True,
            "max_req_input_len": self.limit - 6,
        } | info
        self.http = ThreadingHTTPServer(("127.0.0.1", port), self._handler())
        self.http.daemon_threads = True
        self.port = self.http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()
        assert not self.broken, self.broken

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: Any) -> None:
                """Say nothing."""

            def _serve(self) -> None:
                size = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(size)) if size else None
                given = self.headers.get("Authorization", "").removeprefix("Bearer ")
                authorised = server.token in (None, given) or self.path == "/health"  # open to probes
                with server.lock:
                    status, answer = (
                        server.answer(self.command, self.path, body)
                        if authorised
                        else (401, {"error": "Unauthorized"})
                    )
                data = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = _serve

        return Handler

    def answer(self, method: str, route: str, body: Any) -> tuple[int, Any]:
        """Status and body, both checked."""
        self.asked.append((route, body))
        try:
            self.contract.request(route, method, body)
            status, given = getattr(self, route[1:])(body)
            self.contract.answer(route, status, given)
        except (ValueError, AssertionError) as error:
            self.broken.append(f"{route}: {error}")
            return 400, {"error": {"message": str(error)}}
        return status, given

    def health(self, body: Any) -> tuple[int, Any]:
        return 200, None

    def server_info(self, body: Any) -> tuple[int, Any]:
        return 200, self.info

    def model_info(self, body: Any) -> tuple[int, Any]:
        return 200, {"weight_version": self.version}

    def flush_cache(self, body: Any) -> tuple[int, Any]:
        return 200, "Cache flushed."

    def update_weights_from_disk(self, body: Any) -> tuple[int, Any]:
        if self.fault == "refuse":
            return 400, {"success": False, "message": "Failed to update weights", "num_paused_requests": 0}
        if self.fault != "stale":
            own = dict(self.model.named_parameters(remove_duplicate=False))
            for name, tensor in read_weights(Path(body["model_path"])).items():
                own[name].data.copy_(tensor)
        self.version = body["weight_version"]
        return 200, {"success": True, "message": "Succeeded", "num_paused_requests": 0}

    def generate(self, body: Any) -> tuple[int, Any]:
        if self.fault == "503":
            return 503, {"message": "overloaded"}
        for ids, how in zip(body["input_ids"], body["sampling_params"], strict=True):
            size = self.model.config.vocab_size
            wrong = [int(token) for token in how.get("logit_bias", ()) if not 0 <= int(token) < size]
            if wrong or len(ids) + how["max_new_tokens"] > self.limit:
                said = (
                    f"logit_bias must has keys in [0, {size - 1}]" if wrong else "exceeds the context length"
                )
                return 400, {"error": {"message": said}}
        answers = self._sample(body["input_ids"], body["sampling_params"])
        if self.fault in ("abort", "two_loads"):
            meta = answers[-1]["meta_info"]
            spans = [{"version": v, "start": i, "end": i + 1} for i, v in enumerate(("old", "new"))]
            reason = {"type": "abort", "message": "Aborted", "status_code": None, "err_type": None}
            meta |= {"finish_reason": reason} if self.fault == "abort" else {"weight_versions": spans}
            self.fault = ""
        return 200, answers

    def _sample(self, prompts: list[list[int]], settings: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Samples that differ in their seeds alone; the stop token stays among the ids, as in SGLang."""
        how, seeds = settings[0], [each["sampling_seed"] for each in settings]
        assert all(each | {"sampling_seed": 0} == how | {"sampling_seed": 0} for each in settings)
        banned = tuple(int(token) for token, bias in how.get("logit_bias", {}).items() if bias <= -1e8)
        ends = (self.eos, *how["stop_token_ids"])
        params = SamplingParams(
            how["max_new_tokens"], temperature=how["temperature"], eos_ids=ends, banned_ids=banned
        )
        sampling = self.engine.sample([Prompt(tuple(ids), ()) for ids in prompts], params, 1, seeds)
        return [self._answer(thought) for (thought,) in asyncio.run(sampling)]

    def _answer(self, thought: Thought) -> dict[str, Any]:
        stopped = thought.finish_reason is FinishReason.EOS
        count = len(thought.token_ids)
        reason = {"type": "stop", "matched": thought.token_ids[-1]} if stopped else None
        return {
            "text": "",
            "output_ids": list(thought.token_ids),
            "meta_info": {
                "finish_reason": reason or {"type": "length", "length": count},
                "weight_version": self.version or "default",
                "output_token_logprobs": [
                    [logp, token, None]
                    for logp, token in zip(thought.behaviour_logps, thought.token_ids, strict=True)
                ],
                "weight_versions": [{"version": self.version or "default", "start": 0, "end": count}],
            },
        }
