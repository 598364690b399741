"""Tree attention on a GPU: the tree as a block mask of FlexAttention."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from rlpretrain.tree import Tree


@lru_cache(maxsize=1)
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    limit = torch._dynamo.config.recompile_limit  # each bucket compiles once, and could reach it
    torch._dynamo.config.recompile_limit = max(limit, 64)
    return torch.compile(flex_attention, dynamic=False)


def flex(
    q: Tensor, k: Tensor, v: Tensor, tree: Tree, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """Tree attention by FlexAttention, on tokens padded to a bucket: it compiles once for each bucket.

    It has never run on a GPU.
    """
    size, room = q.shape[2], bucket(q.shape[2])
    q, k, v = (nn.functional.pad(x, (0, 0, 0, room - size)) for x in (q, k, v))

    def cap(score: Tensor, *_: Any) -> Tensor:
        assert softcap is not None, "used only with a soft cap"
        return softcap * torch.tanh(score / softcap)

    out = _compiled()(
        q,
        k,
        v,
        score_mod=cap if softcap else None,
        block_mask=_block_mask(tree, room, window, str(q.device)),
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out[:, :, :size]


def bucket(size: int) -> int:
    """`size` rounded up, by less than 128 or an eighth of it, so that there are few different shapes."""
    step = max(128, 1 << max(0, size.bit_length() - 4))
    return -(-size // step) * step


@lru_cache(maxsize=8)
def _block_mask(tree: Tree, room: int, window: int | None, device: str) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    segment, place, reach = (torch.from_numpy(x).to(device) for x in tree.reach)
    depth, more = torch.from_numpy(tree.positions).to(device), (0, room - tree.size)
    segment, depth = nn.functional.pad(segment, more), nn.functional.pad(depth, more)
    place = nn.functional.pad(place, more, value=1 << 30)  # no token sees the padding of the bucket

    def sees(b: Any, h: Any, i: Tensor, j: Tensor) -> Tensor:
        on_path = (place[j] < reach[segment[i], segment[j]]) & (depth[j] <= depth[i])
        near = depth[i] - depth[j] < window if window else True
        return (on_path & near) | (i == j)

    return create_block_mask(sees, None, None, room, room, device=device)
