"""Shape, weights, updates and probes of the models that vLLM serves in tests."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch

from rollout import Prompt, Thought
from rollout.probe import Probe
from tests.builders.sampling import logps_of

pytest.importorskip("vllm", reason="needs the CPU build of vLLM: make env LOCK=test-cpu")
from rollout.vllm_local import VLLMEngine  # noqa: E402

VOCABULARY = 40
SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "initializer_range": 0.3,
    "max_position_embeddings": 512,
}


def weights_of(model, drop: tuple[str, ...] = ()):
    return lambda: [
        (n, p.detach()) for n, p in model.named_parameters(remove_duplicate=False) if n not in drop
    ]


def move(model, size: float = 0.05) -> None:
    """Change every weight at random, so that every log-prob changes."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += size * torch.randn_like(parameter)


def worst(model, prompts: list[Prompt], groups: list[list[Thought]]) -> float:
    """The largest difference between an engine's log-probs and the model's."""
    return max(
        float((logps_of(model, prompt.token_ids, t.token_ids) - torch.tensor(t.behaviour_logps)).abs().max())
        for prompt, group in zip(prompts, groups, strict=True)
        for t in group
    )


def ask(probe: Probe, model, engine: VLLMEngine, version: int) -> float:
    thoughts = asyncio.run(probe.ask(engine))
    logps = [logps_of(model, probe.prompt.token_ids, t.token_ids).tolist() for t in thoughts]
    return asyncio.run(probe.verify(engine, thoughts, logps, version))
