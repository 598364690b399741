"""Models and layouts of the tree tests."""

from __future__ import annotations

import random
import zlib
from typing import Any

import torch

from rlpretrain.scoring import attention
from rlpretrain.scoring.packing import Layout, count, pack
from rlpretrain.scoring.scorer import Scorer, score
from rlpretrain.types import Batch, MicroBatch
from rollout.types import FinishReason, Group, Position, Prompt, Thought
from tests.builders.batches import CLOSE, OPEN, VOCABULARY
from tests.builders.tiny import tiny_model

MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "gpt2": {},
    "gpt_neox": {},
    "mistral": {"sliding_window": 7},
    "gemma2": {"sliding_window": 7, "attn_logit_softcapping": 0.5, "attn_implementation": "eager"},
}


def model_of(name: str, **changes: Any) -> Any:
    """A tiny model that attends along trees where it is told to."""
    model = tiny_model(name, VOCABULARY, seed=1, initializer_range=0.2, **MODELS[name] | changes)
    assert attention.why_not(model) is None
    attention.install(model)
    return model


def templated(rng: random.Random, groups: int, thoughts: int) -> Batch:
    """Prompts with a common head, that share a part of what follows, and no document: RLPT's kind."""
    head = tuple(rng.randrange(3, 60) for _ in range(rng.randint(0, 20)))
    text = tuple(rng.randrange(3, 60) for _ in range(40))
    made = []
    for i in range(groups):
        context = (
            *head,
            *text[: rng.randint(1, 30)],
            *(rng.randrange(3, 60) for _ in range(rng.randint(0, 4))),
        )
        target = tuple(rng.randrange(3, 60) for _ in range(rng.randint(1, 5)))
        said = [tuple(rng.randrange(3, 60) for _ in range(rng.randint(0, 9))) for _ in range(thoughts)]
        thought = tuple(Thought(s, (-1.0,) * len(s), FinishReason.LENGTH, 0, g) for g, s in enumerate(said))
        position, prompt = (
            Position("none", len(context), context, target),
            Prompt((*context, OPEN), (CLOSE,), (CLOSE,)),
        )
        made.append(Group(f"t{i}", position, prompt, thought, 0))
    return Batch(tuple(made), ())


def laid(batch: Batch, tree: bool, budget: int = 10**6) -> list[MicroBatch]:
    return list(pack(batch, Layout(budget, cut="force_close", tree=tree), count(batch, "force_close")))


def numbers(model: Any, micros: list[MicroBatch]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(log-probs by group and kind, gradients) of a loss in which everything counts, each with a weight of
    its own.
    """
    found, loss, trunk = {}, torch.zeros(()), []
    for micro in micros:
        scores = score(Scorer(model), micro, temperature=0.8)
        trunk.append(scores.trunk_logps)
        for b, group in enumerate(micro.groups):
            size, k = len(group.position.target_ids), micro.offsets[b]
            parts = {"baseline": scores.baseline_logps[b, :size]}
            for g, t in enumerate(group.thoughts):
                parts[f"thought {k + g}"] = scores.thought_logps[b, g, : len(t.token_ids)]
                parts[f"target {k + g}"] = scores.target_logps[b, g, :size]
            for kind, logps in parts.items():
                found[f"{group.id} {kind}"] = logps.detach()
                if kind != "baseline":
                    seed = zlib.crc32(f"{group.id} {kind}".encode())
                    weights = torch.randn(logps.shape, generator=torch.Generator().manual_seed(seed))
                    loss = loss + (weights * logps).sum()
    found["trunk"] = torch.cat(trunk).detach().sort().values
    (loss + 0.3 * torch.cat(trunk).sum()).backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found, gradients
