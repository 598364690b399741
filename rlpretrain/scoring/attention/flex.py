"""Tree attention on a GPU: the tree as a block mask of FlexAttention, compiled once for all trees.

Tensors are padded to whole blocks, and their number of blocks is the only dynamic size. The mask is a
function of tensors with one entry for each token (`blocks.Walk`), so that another tree is only other inputs.
There is one compilation for each of: with and without gradient, with and without a window, each dtype, each
number and width of heads. What of this has run on which device: docs/gpu.md.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from rewards.fused_tiles import allow_compilations
from rlpretrain.scoring.attention.blocks import BLOCK, blocks_of, walk
from rlpretrain.tree import Tree


class Mask(NamedTuple):
    """A tree's mask on a device; the lists of blocks are those of `BlockMask`, with M / 128 blocks a row."""

    kv_num_blocks: Tensor
    kv_indices: Tensor
    full_kv_num_blocks: Tensor
    full_kv_indices: Tensor
    q_num_blocks: Tensor
    q_indices: Tensor
    full_q_num_blocks: Tensor
    full_q_indices: Tensor
    enter: Tensor
    """[M / 128, 128] as in `Walk`; padding is entered last."""
    leave: Tensor
    depth: Tensor | None
    """[M / 128, 128] position ids; None without a window."""
    horizon: Tensor | None
    """[M / 128, 128] a token attends to none at this position id or a smaller one."""


def flex(
    q: Tensor, k: Tensor, v: Tensor, tree: Tree, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """Tree attention by FlexAttention: query [1, H, N, D], key and value [1, K, N, D] → [1, H, N, D].

    N is the tokens of the tree, and may include padding up to `padded_size`. Copies are made only of inputs
    that are not padded, or whose heads are not interleaved in memory as a projection leaves them.
    """
    size, padded = q.shape[2], padded_size(q.shape[2])
    inputs = [_in_blocks(x, padded) for x in (q, k, v)]
    mask = mask_of(tree, padded, window, q.device)
    allow_compilations()  # the usual limit, after which there is an error, is soon used up by two models
    return compiled()(*inputs, mask, scale, softcap)[:, :, :size]


def padded_size(size: int) -> int:
    """`size` in whole blocks, at least two: torch compiles a size of 1 for itself."""
    return max(2, -(-size // BLOCK)) * BLOCK


@lru_cache(maxsize=8)
def mask_of(tree: Tree, padded: int, window: int | None, device: torch.device) -> Mask:
    """The mask of a tree that is padded to `padded` tokens; padding attends to itself."""
    more = np.arange(tree.size, padded)
    enter, leave = walk(tree)
    tokens: list[np.ndarray] = [np.concatenate([enter, more]), np.concatenate([leave, more + 1])]
    if window:
        depth = np.concatenate([tree.positions, more])
        tokens += [depth, depth - window]
    partial, full = blocks_of(tree, padded, window)
    lists = [x for dense in (partial, full, partial.T, full.T) for x in _ordered(dense)]
    on_device = [torch.from_numpy(x.astype(np.int32)).to(device) for x in (*lists, *tokens)]
    for x in on_device[:8]:
        for dim in range(2, x.dim()):
            torch._dynamo.mark_dynamic(x, dim)
    by_block = [x.view(-1, BLOCK) for x in on_device[8:]]
    for x in by_block:
        torch._dynamo.mark_dynamic(x, 0)
    return Mask(*on_device[:8], *by_block, *([] if window else [None, None]))


def _ordered(dense: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each row of blocks [1, 1, M / 128] the number of True, and [1, 1, M / 128, M / 128] these first."""
    return dense.sum(-1)[None, None], np.argsort(~dense, axis=-1, kind="stable")[None, None]


def _in_blocks(x: Tensor, padded: int) -> Tensor:
    """[1, H, N, D] → [1, H, M / 128, 128, D], so that a compiler knows that M is a multiple of 128.

    In memory the heads of a token are neighbours: one layout, so that nothing is compiled again.
    """
    by_token = x.transpose(1, 2).contiguous()
    if padded != x.shape[2]:
        by_token = nn.functional.pad(by_token, (0, 0, 0, 0, 0, padded - x.shape[2]))
    x = by_token.transpose(1, 2).unflatten(2, (-1, BLOCK))
    if not torch.is_grad_enabled():
        x = x.detach()  # a weight itself would be another compilation
    torch._dynamo.mark_dynamic(x, 2)
    return x


@lru_cache(maxsize=1)
def compiled() -> Any:
    """`_attend`, compiled. `fullgraph`: an error, not plain products of all pairs, where it cannot be."""
    return torch.compile(_attend, dynamic=False, fullgraph=True)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, softcap: float | None) -> Tensor:
    """FlexAttention of tensors in blocks; this is the function that is compiled."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    q, k, v = (x.flatten(2, 3) for x in (q, k, v))
    enter, leave = mask.enter.flatten(), mask.leave.flatten()
    depth = None if mask.depth is None else mask.depth.flatten()
    horizon = None if mask.horizon is None else mask.horizon.flatten()

    def attends(b: Any, h: Any, i: Tensor, j: Tensor) -> Tensor:
        return (enter[j] <= enter[i]) & (enter[i] < leave[j])

    def attends_within(b: Any, h: Any, i: Tensor, j: Tensor) -> Tensor:
        assert depth is not None and horizon is not None, "used only with a window"
        return (enter[j] <= enter[i]) & (enter[i] < leave[j]) & (depth[j] > horizon[i])

    def cap(score: Tensor, *_: Any) -> Tensor:
        assert softcap is not None, "used only with a soft cap"
        return softcap * torch.tanh(score / softcap)

    block_mask = BlockMask(
        seq_lengths=(q.shape[2], k.shape[2]),
        kv_num_blocks=mask.kv_num_blocks,
        kv_indices=mask.kv_indices,
        full_kv_num_blocks=mask.full_kv_num_blocks,
        full_kv_indices=mask.full_kv_indices,
        q_num_blocks=mask.q_num_blocks,
        q_indices=mask.q_indices,
        full_q_num_blocks=mask.full_q_num_blocks,
        full_q_indices=mask.full_q_indices,
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=attends if horizon is None else attends_within,
    )
    return flex_attention(
        q,
        k,
        v,
        score_mod=None if softcap is None else cap,
        block_mask=block_mask,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
