"""`rlpretrain serve`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from rlpretrain.commands.arguments import amount, count, path


def register(commands: Any) -> None:
    """Add `serve` to the command line."""
    p = commands.add_parser("serve", help="an engine behind HTTP, for trainers elsewhere")
    p.add_argument("model", type=path, help="hub id or folder")
    p.add_argument("--engine", choices=["vllm", "hf"], default="vllm")
    p.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; any but loopback needs --token-file"
    )
    p.add_argument("--port", type=count, default=8000)
    p.add_argument("--token-file", type=path, help="file with the bearer token that every request must carry")
    p.add_argument(
        "--weights-dir", type=path, help="the only folder that weights are loaded from; none, no new weights"
    )
    p.add_argument("--name", help="what /v1/models calls the model; its path by default")
    p.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    p.add_argument("--device", default="auto", help="of the hf engine")
    p.add_argument(
        "--max-model-len", type=count, help="longest context plus thought in tokens; the model's by default"
    )
    p.add_argument("--batch-size", type=count, default=256, help="most thoughts decoded at once")
    p.add_argument(
        "--kv-cache-gib",
        type=float,
        default=0.5,
        help="vLLM's key-value cache; 0 leaves it to the memory share",
    )
    p.add_argument(
        "--gpu-memory-utilization", type=amount, default=0.9, help="share of a GPU, with --kv-cache-gib 0"
    )
    p.add_argument(
        "--max-requests", type=count, default=256, help="sampling requests at a time; more get 429"
    )
    p.add_argument("--max-n", type=count, default=1024, help="thoughts for one prompt")
    p.add_argument("--max-body-mib", type=amount, default=8, help="largest request body")
    p.add_argument("--request-timeout", type=amount, default=600, help="seconds that sampling may take")
    p.add_argument("--revision", help="branch, tag or commit on the hub")
    p.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the checkpoint")
    p.set_defaults(command=serve)


def serve(args: argparse.Namespace, rest: Sequence[str]) -> int:
    """`rlpretrain serve MODEL --engine vllm|hf`."""
    from rlpretrain.tools.serve import serve as run

    return run(args)
