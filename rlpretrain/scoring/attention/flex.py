"""Tree attention on a GPU: the tree as a block mask of FlexAttention."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from rlpretrain.tree import Tree

# GPU


@lru_cache(maxsize=1)
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.config.recompile_limit = max(
        torch._dynamo.config.recompile_limit, 64
    )  # one for each shape bucket
    return torch.compile(flex_attention, dynamic=False)


def flex(
    q: Tensor, k: Tensor, v: Tensor, tree: Tree, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """The same on FlexAttention. The tokens are padded to a bucket, so that it compiles once a bucket. Has
    never run on a GPU.
    """
    size, room = q.shape[2], bucket(q.shape[2])
    q, k, v = (nn.functional.pad(x, (0, 0, 0, room - size)) for x in (q, k, v))

    def cap(score: Tensor, *_: Any) -> Tensor:
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
    """The next multiple of a power of two, an eighth of `size` or less, at least 128: little padding, few
    shapes.
    """
    step = max(128, 1 << max(0, size.bit_length() - 4))
    return -(-size // step) * step


@lru_cache(maxsize=8)
def _block_mask(tree: Tree, room: int, window: int | None, device: str) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    segment, place, reach = (torch.from_numpy(x).to(device) for x in tree.reach)
    depth, more = torch.from_numpy(tree.positions).to(device), (0, room - tree.size)
    segment, depth = nn.functional.pad(segment, more), nn.functional.pad(depth, more)
    place = nn.functional.pad(place, more, value=1 << 30)  # nobody sees what fills the bucket

    def sees(b: Any, h: Any, i: Tensor, j: Tensor) -> Tensor:
        on_path = (place[j] < reach[segment[i], segment[j]]) & (depth[j] <= depth[i])
        near = depth[i] - depth[j] < window if window else True
        return (on_path & near) | (i == j)

    return create_block_mask(sees, None, None, room, room, device=device)
