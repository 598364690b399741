"""The bad requests of `benchmarks.bad_input`, and the status that each must get."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

TOKEN = "a-token-that-only-the-trainer-knows"
VOCABULARY = 300


@dataclass
class Case:
    """A request, and the status it must get; a `body` of bytes is sent as it is, any other as JSON."""

    name: str
    status: int
    route: str = "/rollout"
    body: Any = None
    method: str = "POST"
    headers: dict[str, str] = field(default_factory=lambda: {"Authorization": f"Bearer {TOKEN}"})


def rollout(**changes: Any) -> dict[str, Any]:
    """A valid body of `/rollout`, with changes."""
    good = {"prompts": [{"token_ids": [5, 6, 7]}], "params": {"max_thought_tokens": 8}, "n": 2, "seeds": [0]}
    return {k: v for k, v in (good | changes).items() if v is not None}


def reload(path: str, **changes: Any) -> dict[str, Any]:
    """A body of `/collective_rpc`."""
    return {"method": "reload_weights", "kwargs": {"weights_path": path}} | changes


class Bomb:
    """An object that creates a file when it is unpickled."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (self.path, "w"))


def cases(weights: Path, model: Path, secret: Path) -> list[Case]:
    """All cases; writes the bad files into `weights`. `secret` is a file outside that folder."""
    good = load_file(model / "model.safetensors")
    name = next(iter(good))
    files = {
        "good": good,
        "missing": {k: v for k, v in good.items() if k != name},
        "half": good,
        "shape": good | {name: torch.zeros(2, 2)},
        "unknown": good | {"x": torch.zeros(1)},
        "integers": good | {name: torch.zeros_like(good[name], dtype=torch.int64)},
    }
    for what, state in files.items():
        (weights / what).mkdir(exist_ok=True)
        save_file(state, weights / what / "model.safetensors", metadata={"format": "pt"})
    half = weights / "half" / "model.safetensors"
    half.write_bytes(half.read_bytes()[: half.stat().st_size // 2])
    for what in ("pickle", "empty"):
        (weights / what).mkdir(exist_ok=True)
    (weights / "pickle" / "model.safetensors").write_bytes(pickle.dumps(Bomb(str(weights / "unpickled"))))
    (weights / "pickle" / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(str(weights / "unpickled"))))
    link = weights / "link.safetensors"
    link.unlink(missing_ok=True)
    link.symlink_to(secret)
    (weights / "text.safetensors").write_text(secret.read_text())
    rpc, completions = "/collective_rpc", "/v1/completions"
    octets = {"Content-Type": "application/octet-stream", "Authorization": f"Bearer {TOKEN}"}
    return [
        Case("no token", 401, body=rollout(), headers={}),
        Case("wrong token", 401, body=rollout(), headers={"Authorization": f"Bearer {TOKEN[:-1]}x"}),
        Case("wrong token, for weights", 401, rpc, reload("good"), headers={"Authorization": "Basic x"}),
        Case("malformed JSON", 400, body=b'{"prompts": [{"token_ids": [5,'),
        Case("JSON 100,000 lists deep", 400, body=b"[" * 100_000),
        Case("a number of 10,000 digits", 400, body=b'{"n": ' + b"9" * 10_000 + b"}"),
        Case("not a dictionary", 400, body=[1, 2]),
        Case("a pickle as body", 400, body=pickle.dumps({"n": 1}), headers=octets),
        Case("invalid UTF-8", 400, body=b'{"n": "\xff\xfe"}'),
        Case("9 MiB of body", 413, body=b" " * (9 << 20)),
        Case("an unknown field", 400, body=rollout(best_of=3)),
        Case("no prompts", 400, body=rollout(prompts=None)),
        Case("an empty prompt", 400, body=rollout(prompts=[{"token_ids": []}])),
        Case("a prompt of 100,000 ids", 400, body=rollout(prompts=[{"token_ids": [5] * 100_000}])),
        Case("a million ids that are none", 400, body=rollout(prompts=[{"token_ids": ["x"] * 1_000_000}])),
        Case("2,000 prompts", 400, body=rollout(prompts=[{"token_ids": [5]}] * 2000, seeds=[0] * 2000)),
        Case("n = 10^6", 400, body=rollout(n=10**6)),
        Case("n = 0", 400, body=rollout(n=0)),
        Case("a token id over the vocabulary", 400, body=rollout(prompts=[{"token_ids": [VOCABULARY]}])),
        Case("a negative token id", 400, body=rollout(prompts=[{"token_ids": [-1]}])),
        Case("a token id of 2^70", 400, body=rollout(prompts=[{"token_ids": [2**70]}])),
        Case(
            "a stop id over the vocabulary",
            400,
            body=rollout(prompts=[{"token_ids": [5], "stop_ids": [VOCABULARY]}]),
        ),
        Case(
            "a stop string that is no text",
            400,
            body=b'{"prompts": [{"token_ids": [5], "stop_strings": ["\\ud800"]}], '
            b'"params": {"max_thought_tokens": 2}, "n": 1, "seeds": [0]}',
        ),
        Case("a seed missing", 400, body=rollout(seeds=[])),
        Case("a negative seed", 400, body=rollout(seeds=[-5])),
        Case(
            "temperature NaN",
            400,
            body=b'{"prompts": [{"token_ids": [5]}], "params": {"max_thought_tokens": 2, "temperature": '
            b'NaN}, "n": 1, "seeds": [0]}',
        ),
        Case("temperature -1", 400, body=rollout(params={"max_thought_tokens": 2, "temperature": -1})),
        Case("a thought of 10^9 tokens", 400, body=rollout(params={"max_thought_tokens": 10**9})),
        Case("positions that do not match", 400, body=rollout(positions=[])),
        Case("an unknown model", 404, completions, {"model": "gpt-9", "prompt": [5]}),
        Case("stream", 400, completions, {"prompt": [5], "stream": True}),
        Case("path traversal", 403, rpc, reload("../../../../../../etc/passwd")),
        Case("an absolute path elsewhere", 403, rpc, reload(str(secret))),
        Case("a link that leads out", 403, rpc, reload("link.safetensors")),
        Case("a path with NUL", 403, rpc, reload("good\0")),
        Case("a path that is not there", 403, rpc, reload("nothing")),
        Case("a folder without weights", 400, rpc, reload("empty")),
        Case("a pickle instead of safetensors", 400, rpc, reload("pickle")),
        Case("a text file instead of safetensors", 400, rpc, reload("text.safetensors")),
        Case("half a safetensors file", 400, rpc, reload("half")),
        Case("weights of another shape", 400, rpc, reload("shape")),
        Case("weights that lack one", 400, rpc, reload("missing")),
        Case("weights with one more", 400, rpc, reload("unknown")),
        Case("weights that are integers", 400, rpc, reload("integers")),
        Case("another remote call", 400, rpc, reload("good", method="shutdown")),
        Case("an unknown route", 404, "/v1/chat/completions", {}),
        Case("an unknown verb", 405, body={}, method="DELETE"),
    ]
