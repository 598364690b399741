"""Whether trees score a model rightly, tried on a few tokens: its configuration does not say all of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from rlpretrain.compat import attention_of, backbone_of, embedding_weight_of, sharded, text_config_of
from rlpretrain.models.kernels import attending_by
from rlpretrain.models.lengths import limit_of
from rlpretrain.models.randomness import in_mode
from rlpretrain.tree import Tree

_TREE = Tree(lengths=(6, 4, 4), paths=((), ((0, 6),), ((0, 6),)))
_ROWS = torch.tensor([[*range(10)], [*range(6), *range(10, 14)]])
"""The tokens of `_TREE` in its two rows."""
_CHAIN = Tree(lengths=(6, 4), paths=((), ((0, 6),)))
"""One of the rows, read as a tree: without a fork only rounding can set it apart."""
_NAME = "tree_probe"


@torch.no_grad()
def why_wrong(model: nn.Module, attend: Callable[..., Any]) -> str | None:
    """Why trees would score a model wrongly, or None; `attend` is the attention function that takes trees.

    On a GPU, where trees are compiled, only the arguments of the attention are looked at (docs/gpu.md). It is
    not tried on a model whose weights are not whole on this rank.
    """
    weight, limit = embedding_weight_of(model), limit_of(model)
    short = limit is not None and limit.tokens < _ROWS.shape[1]
    if short or sharded(model) or any(p.is_meta for p in model.parameters()):
        return None
    ids = torch.arange(_TREE.size, device=weight.device) % weight.shape[0]
    rows = ids[_ROWS.to(ids.device)]
    in_rows = {"input_ids": rows, "attention_mask": torch.ones_like(rows), "use_cache": False}
    names, compiled = set[str](), weight.is_cuda

    def listen(*args: Any, **kwargs: Any) -> Any:
        names.update(name for name, value in kwargs.items() if value is not None)
        return attend(*args, **kwargs | {"tree": None} if compiled else kwargs)

    def read(ids: torch.Tensor, tree: Tree) -> torch.Tensor:
        given = in_rows if compiled else in_rows | _given(ids, tree)
        return backbone(**given, tree=tree).last_hidden_state

    _register(listen, attention_of(model))
    backbone = backbone_of(model)
    with in_mode(model, training=False):
        with attending_by(model, "eager"):  # which defines the model
            gold = backbone(**in_rows).last_hidden_state
        with attending_by(model, _NAME):
            try:
                ours = read(ids, _TREE)
                chains = None if compiled else torch.cat([read(row, _CHAIN) for row in rows])
            except (TypeError, ValueError) as error:
                return f"its forward takes no tree: {error}"
    if "tree" not in names:
        return "its layers do not pass a tree on to their attention"
    if _has_window(model) and "sliding_window" not in names:
        return "its layers do not tell their attention its window"
    if chains is None:
        return None
    rounding = _apart(chains, gold)  # small in float32, and not in half precision
    if _apart(ours[0][_ROWS], gold) <= max(1e-4, 2 * rounding):
        return None
    return "its tokens also mix outside attention, or in a way of its own"


def _given(ids: torch.Tensor, tree: Tree) -> dict[str, torch.Tensor]:
    """What a backbone reads of a tree."""
    return {
        "input_ids": ids[None],
        "attention_mask": torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=ids.device),
        "position_ids": torch.from_numpy(tree.positions).to(ids.device)[None],
    }


def _apart(ours: torch.Tensor, gold: torch.Tensor) -> float:
    """Mean difference of hidden states, as a part of their mean size."""
    return float((ours.float() - gold.float()).abs().mean() / gold.float().abs().mean())


def _register(attend: Callable[..., Any], like: str) -> None:
    """Make an attention function known to transformers, with the masks of another one."""
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

    AttentionInterface.register(_NAME, attend)
    AttentionMaskInterface.register(_NAME, ALL_MASK_ATTENTION_FUNCTIONS[like])


def _has_window(model: nn.Module) -> bool:
    """Whether some layer has a window that is shorter than the longest row."""
    config, limit = text_config_of(model), limit_of(model)
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    return bool(window) and "sliding_attention" in kinds and (limit is None or window < limit.tokens)
