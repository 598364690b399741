"""What a real run does at each update: the weights before it, the gradient, the loss, and the batch that
was drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from rlpretrain.config.io import build
from rlpretrain.training.loop import train
from rlpretrain.training.run import Run
from tests.builders.runs import merged


@dataclass
class Update:
    """One optimizer step of a run."""

    step: int
    weights: dict[str, torch.Tensor]
    gradient: dict[str, torch.Tensor]
    loss: float


@dataclass
class Record:
    """A run: its batches as drawn, before the objective selects, and its updates."""

    run: Run
    batches: list[Any] = field(default_factory=list)
    updates: list[Update] = field(default_factory=list)


def record(
    values: dict[str, Any], prepare: Callable[[Run], None] = lambda run: None, **changes: Any
) -> Record:
    """Train, and note every update."""
    flat = {
        "optim__clip_grad_norm": 0.0,
        "optim__warmup_steps": 0,
        "optim__lr": 2e-3,
        "optim__schedule": "cosine",
    }
    run = Run(build(merged(values, **flat | changes)), None)
    prepare(run)
    out, losses = Record(run), [0.0]
    take, step, backward = run.source.take, run.policy.step, run.policy.backward

    def drawn(*args: Any) -> Any:
        out.batches.append(take(*args))
        return out.batches[-1]

    def summed(loss: torch.Tensor) -> None:
        losses[-1] += float(loss.detach())
        backward(loss)

    def noted() -> Any:
        named = dict(run.policy.model.named_parameters())
        weights = {n: p.detach().clone() for n, p in named.items()}
        gradient = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in named.items()}
        out.updates.append(Update(run.step, weights, gradient, losses[-1]))
        losses.append(0.0)
        return step()

    run.source.take, run.policy.step, run.policy.backward = drawn, noted, summed
    train(run)
    run.close()
    return out


@cache
def read(folder: str) -> PreTrainedModel:
    """The checkpoint as transformers reads it, in float64 where its kernels have it."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    return model if hasattr(model.config, "num_experts") else model.double()


def model_with(folder: str, weights: dict[str, torch.Tensor]) -> PreTrainedModel:
    """The same with other weights."""
    model = deepcopy(read(folder))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(weights[name])
    return model


class Baselines:
    """The models that the arm without a thought was read by at each update."""

    def __init__(self, name: str, folder: str, record: Record, decay: float = 0.0):
        self.name, self.folder, self.updates, self.decay = name, folder, record.updates, decay

    def at(self, i: int) -> PreTrainedModel | None:
        """Before update i."""
        if self.name == "none":
            return None
        if self.name == "self":
            return model_with(self.folder, self.updates[i].weights)
        shadow = {n: w.double() for n, w in self.updates[0].weights.items()}
        if self.name == "ema":  # phi <- decay phi + (1 - decay) theta after each update
            for update in self.updates[1 : i + 1]:
                shadow = {
                    n: self.decay * w + (1 - self.decay) * update.weights[n].double()
                    for n, w in shadow.items()
                }
        return model_with(self.folder, shadow)


class Sampler:
    """An engine that draws thoughts at random among some words, and answers that are often right.

    Log-probs of what it draws are near those of the policy, so that importance weights matter and are
    truncated now and then.
    """

    shares_weights, version = False, 0

    def __init__(
        self, run: Run, tokens: list[int], answer: Callable[[list[int], Any], list[int]], thought: int = 5
    ):
        self.run, self.tokens, self.answer, self.longest = run, tokens, answer, thought

    async def sample(self, prompts: Any, params: Any, n: int, seeds: Any) -> list[list[Any]]:
        import numpy as np

        from rollout.types import FinishReason, Thought

        out = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            rng, found = np.random.default_rng(seed % 2**32), []
            for k in range(n):
                if prompt.stop_strings:
                    ids = self.answer(list(prompt.token_ids), rng)
                else:
                    ids = [int(rng.choice(self.tokens)) for _ in range(rng.integers(1, self.longest))]
                close = bool(prompt.stop_strings) or rng.random() < 0.8
                ids += [] if prompt.stop_strings or not close else [prompt.stop_ids[0]]
                logps = tuple(float(x) for x in rng.normal(-4.3, 0.4, size=len(ids)))
                reason = FinishReason.CLOSE if close else FinishReason.LENGTH
                found.append(Thought(tuple(ids), logps, reason, 0, int(seed) + k))
            out.append(found)
        return out
