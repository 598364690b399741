"""The next-token loss of the model that a TRL trainer trains, without holding its logits.

The trainer calls the model through DDP, FSDP or DeepSpeed, and sharded weights are whole only inside that
call. So the forward of the causal language model gets one more keyword, `next_token_logps`. With it the
forward runs the backbone and the library's chunked head (`scoring.Scorer`) and returns log-probabilities
instead of logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import wraps
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from rlpretrain.scoring.scorer import Scorer
from rlpretrain.trl.callback import plain


def add_next_token_logps(model: nn.Module) -> None:
    """Let `model(input_ids=..., attention_mask=..., next_token_logps=True)` return log-probs [R, S - 1].

    Entry [r, s] is log p(token s + 1 | tokens up to s) of row r in nats, and 0 where the mask is 0. Without
    the keyword the forward is unchanged. `model` may have adapters, and may be wrapped afterwards.
    """
    inner = plain(model)
    usual_forward = inner.forward

    @wraps(type(inner).forward)  # `generate` reads the signature
    def forward(self: nn.Module, *args: Any, next_token_logps: bool = False, **kwargs: Any) -> Any:
        if not next_token_logps:
            return usual_forward(*args, **kwargs)
        return _next_token_logps(self, kwargs["input_ids"], kwargs["attention_mask"])

    inner.forward = MethodType(forward, inner)


def _next_token_logps(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    counted = attention_mask[:, 1:].bool()
    rows = torch.arange(input_ids.numel(), device=input_ids.device).view_as(input_ids)[:, :-1]
    logps, _ = Scorer(model)(input_ids, attention_mask, None, rows[counted], input_ids[:, 1:][counted])
    return logps.new_zeros(counted.shape).masked_scatter(counted, logps)


def next_token_loss(
    model: Any, documents: Sequence[Sequence[int]], times: Sequence[int], device: torch.device
) -> Tensor:
    """Sum of -log p over the predicted tokens of all documents, document i counted `times[i]` times.

    `model` is the trainer's, in its wrappers, after `add_next_token_logps`.
    """
    ids = pad_sequence([torch.tensor(document) for document in documents], batch_first=True).to(device)
    sizes = torch.tensor([len(document) for document in documents], device=device)
    mask = torch.arange(ids.shape[1], device=device) < sizes[:, None]
    logps = model(input_ids=ids, attention_mask=mask.long(), next_token_logps=True)
    return -(logps.sum(1) * torch.tensor(times, device=device)).sum()
