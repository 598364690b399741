"""How the rollout service answers bad input, as a table, and whether it works as before afterwards.

    python -m benchmarks.bad_input [--engine vllm|hf] [--rounds 20] [--json]

A real `rlpretrain serve` as a child process with a token and a folder for weights. All cases are sent
`--rounds` times, then 500 clients at once; memory is read before and after, and the same greedy completion
must come back at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import pickle
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch
from safetensors.torch import load_file, save_file

from benchmarks.process_memory import memory_field
from tests.builders.servers import free_port

TOKEN = "a-token-that-only-the-trainer-knows"
VOCABULARY, LONGEST = 300, 512


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


class Serving:
    """`rlpretrain serve` as a child process, with a small random model, a token, and a folder for weights."""

    def __init__(self, folder: Path, engine: str, *options: str):
        self.model, self.weights, self.secret = folder / "model", folder / "weights", folder / "secret.txt"
        self.secret.write_text("the-secret-of-this-machine " * 50)
        self.weights.mkdir()
        small_model(self.model)
        (folder / "token").write_text(TOKEN)
        self.log = folder / "log.txt"
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        command = [
            sys.executable,
            "-m",
            "rlpretrain.cli",
            "serve",
            str(self.model),
            "--engine",
            engine,
            "--port",
            str(port),
            "--token-file",
            str(folder / "token"),
            "--weights-dir",
            str(self.weights),
            "--name",
            "small",
            "--kv-cache-gib",
            "0.1",
            "--batch-size",
            "64",
            *options,
        ]
        self.process = self.start(command)
        end = time.monotonic() + 180
        while True:
            try:
                if httpx.get(f"{self.url}/health").status_code == 200:
                    break
            except httpx.TransportError:
                if time.monotonic() > end or self.process.poll() is not None:
                    raise RuntimeError(self.log.read_text()[-3000:]) from None
                time.sleep(0.3)
        self.client = httpx.Client(base_url=self.url, timeout=120)

    def start(self, command: list[str]) -> subprocess.Popen[bytes]:
        """The process of a command."""
        with self.log.open("wb") as log:
            return subprocess.Popen(command, stdout=log, stderr=log)

    def send(self, case: Case) -> httpx.Response:
        what = {"content": case.body} if isinstance(case.body, bytes) else {"json": case.body}
        headers = {"Content-Type": "application/json"} | case.headers
        return self.client.request(case.method, case.route, headers=headers, **what)

    def greedy(self) -> list[int]:
        """A greedy thought, which must be the same before and after."""
        body = rollout(params={"max_thought_tokens": 16, "temperature": 0}, n=1)
        answer = self.send(Case("", 200, body=body))
        assert answer.status_code == 200, answer.text
        return answer.json()["groups"][0]["thoughts"][0]["token_ids"]

    def memory(self) -> int:
        """Resident bytes of the process."""
        return memory_field("VmRSS", self.process.pid)

    async def crowd(self, clients: int, per_client: int = 2) -> Counter[int]:
        """The statuses that many clients at once get."""
        limits = httpx.Limits(max_connections=clients, max_keepalive_connections=0)
        headers = {"Authorization": f"Bearer {TOKEN}"}
        async with httpx.AsyncClient(
            base_url=self.url, timeout=120, limits=limits, headers=headers
        ) as client:

            async def send(seed: int) -> list[int]:
                statuses = []
                for k in range(per_client):
                    answer = await client.post("/rollout", json=rollout(seeds=[seed * 100 + k]))
                    statuses.append(answer.status_code)
                return statuses

            answers = await asyncio.gather(*map(send, range(clients)))
            return Counter(status for statuses in answers for status in statuses)

    def close(self) -> None:
        self.client.close()
        self.process.terminate()
        self.process.wait(60)


def small_model(folder: Path) -> None:
    """A random model with a word tokenizer of `VOCABULARY` words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    shape = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "head_dim": 32,
        "num_key_value_heads": 1,
        "max_position_embeddings": LONGEST,
        "initializer_range": 0.3,
    }
    config = AutoConfig.for_model("qwen3", vocab_size=VOCABULARY, tie_word_embeddings=True, **shape)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w1", unk_token="w0").save_pretrained(
        folder
    )


def main() -> None:
    """Send all cases and print the table."""
    parser = argparse.ArgumentParser(description="The service under bad input.")
    parser.add_argument("--engine", choices=["vllm", "hf"], default="vllm")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--clients", type=int, default=500)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        service = Serving(Path(folder), options.engine)
        try:
            rows, memory = [], []
            before = service.greedy()
            bad = cases(service.weights, service.model, service.secret)
            for turn in range(options.rounds):
                for case in bad:
                    answer = service.send(case)
                    leaks = "secret-of-this-machine" in answer.text
                    if turn == 0:
                        error = answer.json()["error"]["message"]
                        rows.append(
                            {
                                "case": case.name,
                                "status": answer.status_code,
                                "as_meant": answer.status_code == case.status,
                                "says": error.replace(folder, "..."),
                                "leaks": leaks,
                            }
                        )
                memory.append(service.memory())
            crowds = [asyncio.run(service.crowd(options.clients)) for _ in range(3)]
            memory_crowd = service.memory()
            report = {
                "benchmark": "bad_input",
                "engine": options.engine,
                "rounds": options.rounds,
                "cases": rows,
                "statuses_of_500_clients": [dict(c) for c in crowds],
                "unpickled": (service.weights / "unpickled").exists(),
                "same_answer_afterwards": service.greedy() == before,
                "alive": service.process.poll() is None,
                "memory_mib": {
                    "after_round_1": memory[0] >> 20,
                    f"after_round_{options.rounds}": memory[-1] >> 20,
                    "after_the_crowds": memory_crowd >> 20,
                },
            }
        finally:
            service.close()
    if options.json:
        print(json.dumps(report))
        return
    print("| what is sent | status | what it says |\n|---|---|---|")
    for row in rows:
        print(
            f"| {row['case']} | {row['status']}{'' if row['as_meant'] else ' (!)'} | "
            f"{row['says'].replace('|', '/')} |"
        )
    for key in ("statuses_of_500_clients", "unpickled", "same_answer_afterwards", "alive", "memory_mib"):
        print(f"{key}: {report[key]}")


if __name__ == "__main__":
    main()
