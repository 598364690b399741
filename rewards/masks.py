"""Masks of target tokens: True counts a token.

Shapes: B positions, G thoughts per position, T target tokens.
"""

from jaxtyping import Bool
from torch import Tensor

TargetMask = Bool[Tensor, "B T"] | Bool[Tensor, "B G T"] | None
"""For each position, or for each thought; None counts every token."""


def expand_mask(mask: Tensor, like: Tensor) -> Tensor:
    """Return a mask [B, T] or [B, G, T] as [B, G, T], the shape of `like`; ValueError if it does not fit."""
    mask = mask.unsqueeze(1) if mask.ndim == 2 else mask
    if mask.shape[::2] != like.shape[::2] or mask.shape[1] not in (1, like.shape[1]):
        raise ValueError(f"mask {tuple(mask.shape)} must be [B, T] or [B, G, T] for {tuple(like.shape)}")
    return mask.expand_as(like)
