"""Prompts, and what an engine samples for them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rollout import HFEngine, Prompt, SamplingParams, Thought

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
