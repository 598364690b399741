"""`rlpretrain serve`: a checkpoint's engine behind HTTP; the routes are rollout/service.py's."""

from __future__ import annotations

import errno
import ipaddress
import socket
from argparse import Namespace
from pathlib import Path
from typing import Any

from rlpretrain import __version__, models
from rlpretrain.compat import text_config_of
from rlpretrain.config import ConfigError, ModelConfig
from rlpretrain.models.lengths import limit_of
from rlpretrain.ranks import join

INSTALL = 'pip install "rlpretrain[serve]"'


def serve(args: Namespace) -> int:
    """Run the service until SIGINT or SIGTERM; thoughts under way are finished.

    Raises ConfigError for what cannot or should not be served, before a model is loaded.
    """
    try:
        import uvicorn

        from rollout.service import create_app
        from rollout.wire import Limits
    except ImportError as error:
        raise ImportError(
            f"rlpretrain serve needs fastapi, uvicorn and prometheus_client: {INSTALL} ({error})"
        ) from error
    token = _token(args.token_file, args.host)
    folder = Path(args.weights_dir) if args.weights_dir else None
    if folder is not None and not folder.is_dir():
        raise ConfigError(f"--weights-dir {folder}: there is no such folder")
    try:
        limits = Limits(
            body_bytes=int(args.max_body_mib * 2**20),
            n=args.max_n,
            requests=args.max_requests,
            request_s=args.request_timeout,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None
    listener = _bind(args.host, args.port)  # before a model is loaded
    app = create_app(served(args), limits=limits, weights_dir=folder, token=token)
    who = "with a bearer token" if token else "without a token: anyone who reaches this address may sample"
    print(
        f"{args.name or args.model} ({args.engine}) on http://{args.host}:{args.port}, {who}; weights from "
        f"{folder or 'nowhere (--weights-dir)'}; Ctrl-C ends it",
        flush=True,
    )
    settings = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=30)
    uvicorn.Server(settings).run(sockets=[listener])
    return 0


def _bind(host: str, port: int) -> socket.socket:
    """The socket to listen on; ConfigError if the address is in use or not of this machine."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        reason = "the port is in use" if getattr(error, "errno", None) == errno.EADDRINUSE else str(error)
        raise ConfigError(
            f"cannot listen on {host}:{port}: {reason}; choose another --port or --host"
        ) from None


def served(args: Namespace) -> Any:
    """The engine and the facts of its model."""
    from rollout.service import Served
    from rollout.weights import parameters_of

    where = {
        "path": args.model,
        "revision": args.revision,
        "dtype": args.dtype,
        "trust_remote_code": args.trust_remote_code,
    }
    config = ModelConfig(**where)
    try:
        parameters = parameters_of(
            args.model, revision=args.revision, trust_remote_code=args.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"no causal language model in '{args.model}': {models.explain_load_error(args.model, error)}"
        ) from error
    try:
        tokenizer = models.load_tokenizer(config)
    except ConfigError as error:
        print(f"no text and no stop strings here: {error}", flush=True)
        tokenizer = None
    eos = () if tokenizer is None or tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    facts = {
        "name": args.name or args.model,
        "tokenizer": tokenizer,
        "eos_ids": eos,
        "version": __version__,
        "parameters": parameters,
    }
    if args.engine == "hf":
        from rollout.batched import BatchedEngine
        from rollout.hf import HFEngine

        model: Any = models.load_model(config).to(join(args.device).device)
        text = text_config_of(model)
        limit = limit_of(model)
        longest = min(args.max_model_len or 1 << 30, limit.tokens if limit else 1 << 30)
        engine = BatchedEngine(
            HFEngine(model, tokenizer=tokenizer, shares_weights=False, batch_size=args.batch_size)
        )
        return Served(engine, max_model_len=longest, vocabulary=text.vocab_size, **facts)
    from rollout.vllm_local import VLLMEngine

    vllm = VLLMEngine(
        args.model,
        tokenizer=args.model if tokenizer is not None else None,
        dtype=args.dtype,
        max_model_len=args.max_model_len,
        max_num_seqs=args.batch_size,
        kv_cache_gib=args.kv_cache_gib or None,
        gpu_memory_utilization=args.gpu_memory_utilization,
        revision=args.revision,
        trust_remote_code=args.trust_remote_code,
    )
    return Served(vllm, max_model_len=vllm.max_model_len, vocabulary=vllm.vocabulary, **facts)


def _token(path: str | None, host: str) -> str | None:
    """The bearer token; ConfigError where one is needed, or the file has none."""
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if path is None:
        if not loopback:
            raise ConfigError(
                f"--host {host} can be reached from elsewhere: give --token-file FILE, a bearer token to ask "
                "for (head -c 32 /dev/urandom | base64 > FILE)"
            )
        return None
    try:
        token = Path(path).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--token-file {path}: {error}") from None
    if len(token) < 16 or not token.isascii() or len(token.split()) != 1:
        raise ConfigError(f"--token-file {path}: a token is one word of at least 16 ASCII characters")
    return token
