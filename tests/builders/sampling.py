"""Prompts, what an engine samples for them, and the weights it gets."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rollout import Engine, HFEngine, Prompt, SamplingParams, Thought
from rollout.probe import Probe

VOCABULARY = 40
PARAMS = SamplingParams(max_thought_tokens=9)


def prompts_of(lengths: Sequence[int], **fields: Any) -> list[Prompt]:
    generator = torch.Generator().manual_seed(0)
    fields = {"stop_ids": (3, 4)} | fields
    return [
        Prompt(tuple(torch.randint(0, VOCABULARY, (k,), generator=generator).tolist()), **fields)
        for k in lengths
    ]


def sample(
    engine: HFEngine,
    prompts: Sequence[Prompt],
    params: SamplingParams = PARAMS,
    n: int = 3,
    seeds: Any = None,
) -> list[list[Thought]]:
    return asyncio.run(engine.sample(prompts, params, n, range(len(prompts)) if seeds is None else seeds))


def tokens(groups: list[list[Thought]]) -> list[list[tuple[int, ...]]]:
    return [[thought.token_ids for thought in group] for group in groups]


@torch.no_grad()
def logps_of(model: Any, context: tuple[int, ...], thought: tuple[int, ...]) -> Tensor:
    """Log-probabilities of a thought from one forward over the whole sequence."""
    logits = model(input_ids=torch.tensor([context + thought]), use_cache=False).logits[
        0, len(context) - 1 : -1
    ]
    return logits.log_softmax(-1).gather(1, torch.tensor(thought)[:, None])[:, 0]


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


def ask(probe: Probe, model, engine: Engine, version: int) -> float:
    thoughts = asyncio.run(probe.ask(engine))
    logps = [logps_of(model, probe.prompt.token_ids, t.token_ids).tolist() for t in thoughts]
    return asyncio.run(probe.verify(engine, thoughts, logps, version))
