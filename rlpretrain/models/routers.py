"""Routers of mixtures of experts: the loss that keeps experts evenly used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rlpretrain.compat import backbone_of, embedding_weight_of, text_config_of
from rlpretrain.config import ConfigError
from rlpretrain.models.randomness import in_mode

ASK = {"output_router_logits": True}
"""What a backbone is asked with for the logits of its routers."""


@torch.no_grad()
def experts_per_token(model: nn.Module) -> int:
    """How many experts each token is sent to; ConfigError if the model does not show its routers' logits."""
    ids = torch.zeros(1, 2, dtype=torch.long, device=embedding_weight_of(model).device)
    why = "is no mixture of experts whose routers transformers shows"
    with in_mode(model, training=False):
        try:
            out: Any = backbone_of(model)(input_ids=ids, use_cache=False, **ASK)
        except TypeError:
            out = None
    most = getattr(text_config_of(model), "num_experts_per_tok", None)
    if not getattr(out, "router_logits", None) or not most:
        raise ConfigError(f"loss.router_coef: {type(model).__name__} {why}: set it to 0")
    return int(most)


def balance_loss(router_logits: Sequence[Tensor], experts: int, mask: Tensor) -> Tensor:
    """How unevenly the tokens of `mask` use the experts, over all layers: transformers' own loss.

    Number of experts × Σ over experts of (share of tokens sent there × mean probability); `experts` of them
    take each token, so evenly used ones give that number. Source: Switch Transformer, arXiv 2101.03961, eq. 4
    to 6.
    """
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits: Any = tuple(layer.flatten(0, -2) for layer in router_logits)
    loss = load_balancing_loss_func(logits, logits[0].shape[-1], experts, mask)
    assert isinstance(loss, Tensor), "there are logits"
    return loss
