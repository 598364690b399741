"""The next-token loss from a model's own logits, and documents to take it on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

DOCUMENTS: list[tuple[int, ...]] = [tuple(range(3, 20)), tuple(range(40, 10, -1)), (5, 60)]
TIMES = [4, 1, 2]
"""How often each document counts."""


def loss_of_logits(
    model: Any, documents: Sequence[Sequence[int]] = DOCUMENTS, times: Sequence[int] = TIMES
) -> Tensor:
    """Sum of -log p over the predicted tokens, document i counted `times[i]` times."""
    ids = pad_sequence([torch.tensor(document) for document in documents], batch_first=True)
    mask = pad_sequence([torch.ones(len(document)) for document in documents], batch_first=True).long()
    labels = ids.masked_fill(mask == 0, -100)
    logits = model(input_ids=ids, attention_mask=mask).logits
    losses = nn.functional.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), labels[:, 1:], reduction="none"
    )
    return (losses.sum(1) * torch.tensor(times)).sum()


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """The gradient of each parameter that has one."""
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found
