"""Random groups and documents, and log-probabilities by the model itself."""

from __future__ import annotations

import random

import torch

from rlpretrain.types import Batch, Document
from rollout.types import FinishReason, Group, Position, Prompt, Thought

OPEN, CLOSE, VOCABULARY = 60, 61, 64


def random_batch(
    rng: random.Random, documents: int = 3, positions: int = 2, thoughts: int = 3, target: int = 2
) -> Batch:
    """Documents with ragged groups: thoughts of 0 to 6 tokens, closed or cut off."""
    groups, docs = [], []
    for d in range(documents):
        ids = tuple(
            rng.randrange(3, 60) for _ in range(rng.randint(target + 3, 20 if target <= 12 else target + 20))
        )
        docs.append(Document(str(d), ids))
        for _ in range(positions):
            i = rng.randint(1, len(ids) - target)
            size = rng.randint(1, target)
            position = Position(str(d), i, ids[:i], ids[i : i + size])
            made = []
            for g in range(thoughts):
                body = tuple(rng.randrange(3, 60) for _ in range(rng.randint(0, 6)))
                closed = rng.random() < 0.7
                said = (*body, CLOSE) if closed else body
                reason = FinishReason.CLOSE if closed else FinishReason.LENGTH
                made.append(Thought(said, (-1.0,) * len(said), reason, 0, g))
            groups.append(
                Group(
                    f"{d}@{i}:{len(groups)}",
                    position,
                    Prompt((*ids[:i], OPEN), (CLOSE,), (CLOSE,)),
                    tuple(made),
                    0,
                )
            )
    return Batch(tuple(groups), tuple(docs))


def logps_of(model, ids) -> torch.Tensor:
    """log p of each token of one sequence but the first, from the model's own logits, unpadded."""
    ids = torch.tensor([ids])
    return model(input_ids=ids).logits[0, :-1].float().log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
