"""Tree attention on a CPU.

A token sees the path before its segment and its segment up to itself. The two parts are computed apart, each
in batched products without a mask, and merged by their log-sum-exps. The backward pass gives each part the
merged ones, so that its own softmax comes out right. Legend: H heads, K of them with keys and values, N
tokens of the tree, D a head's width; n segments of a bin, L tokens of the longest.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from rlpretrain.tree import Fork, Piece, Tree


class TreeAttention(torch.autograd.Function):
    """Attention along a tree: query [1, H, N, D], key and value [1, K, N, D] → [1, H, N, D]."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        tree: Tree,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        ahead, _ = _kernels(scale, softcap)
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=_exact(q))
        for at, real in _bins(tree, q.device):
            seen = _near(tree, window, at) if window else None
            some, sums = ahead(_take(q, at), _take(k, at), _take(v, at), True, seen)
            out[0].index_copy_(1, at[real], some.transpose(0, 1)[:, real])
            lse[0].index_copy_(1, at[real], sums.transpose(0, 1)[:, real])
        for fork in tree.forks:
            own = slice(fork.start, fork.stop)
            seen = _near_path(tree, window, fork)
            some, sums = ahead(q[:, :, own], _pieces(k, fork.path), _pieces(v, fork.path), False, seen)
            both = torch.logaddexp(sums, lse[:, :, own])
            share = (sums - both).exp().unsqueeze(-1).to(q.dtype)
            out[:, :, own] += (some - out[:, :, own]) * share
            lse[:, :, own] = both
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.what = tree, scale, window, softcap
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        q, k, v, out, lse = ctx.saved_tensors
        tree, scale, window, softcap = ctx.what
        _, back = _kernels(scale, softcap)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for at, real in _bins(tree, q.device):
            seen = _near(tree, window, at) if window else None
            g, o, s = _take(grad, at) * real[:, None, :, None], _take(out, at), _take(lse, at)
            parts = back(g, _take(q, at), _take(k, at), _take(v, at), o, s, True, seen)
            for whole, part in zip((dq, dk, dv), parts, strict=True):
                whole[0].index_copy_(1, at[real], part.transpose(0, 1)[:, real])
        for fork in tree.forks:
            own = slice(fork.start, fork.stop)
            seen = _near_path(tree, window, fork)
            some, *pair = back(
                grad[:, :, own],
                q[:, :, own],
                _pieces(k, fork.path),
                _pieces(v, fork.path),
                out[:, :, own],
                lse[:, :, own],
                False,
                seen,
            )
            dq[:, :, own] += some
            for whole, part in zip((dk, dv), pair, strict=True):
                done = 0
                for a, b in fork.path:
                    whole[:, :, a:b] += part[:, :, done : done + b - a]
                    done += b - a
        return dq, dk, dv, None, None, None, None


@lru_cache(maxsize=4)  # every layer asks
def _bins(tree: Tree, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """For each bin, its tokens [n, L] and a mask [n, L] that is False on padding."""
    bins = [torch.from_numpy(at).to(device) for at in tree.bins]
    return [(at.clamp(min=0), at >= 0) for at in bins]


def _take(x: Tensor, at: Tensor) -> Tensor:
    """[1, H, N, ...] → [n, H, L, ...]."""
    if len(at) == 1:
        return x[:, :, int(at[0, 0]) : int(at[0, 0]) + at.shape[1]]
    return x[0][:, at].transpose(0, 1)


def _pieces(x: Tensor, path: tuple[Piece, ...]) -> Tensor:
    """[1, K, N, D] → the tokens of a path."""
    if len(path) == 1:
        start, stop = path[0]
        return x[:, :, start:stop]
    return torch.cat([x[:, :, start:stop] for start, stop in path], dim=2)


def _along(path: tuple[Piece, ...]) -> Tensor:
    return torch.cat([torch.arange(a, b) for a, b in path])


def _near(tree: Tree, window: int, queries: Tensor, keys: Tensor | None = None) -> Tensor:
    """Mask [n, 1, queries, keys] of the keys within a query's window.

    Without `keys`, the keys are the query's own segment up to the query.
    """
    depth = torch.from_numpy(tree.positions)
    query_depth = depth[queries][:, None, :, None]
    key_depth = depth[queries if keys is None else keys][:, None, None, :]
    seen = query_depth - key_depth < window
    return seen.tril() if keys is None else seen


def _near_path(tree: Tree, window: int | None, fork: Fork) -> Tensor | None:
    """`_near` for the tokens of a fork and the path before it; None without a window."""
    if not window:
        return None
    return _near(tree, window, torch.arange(fork.start, fork.stop)[None], _along(fork.path)[None])


def _exact(x: Tensor) -> torch.dtype:
    """The dtype of log-sum-exps and softmaxes."""
    return torch.promote_types(x.dtype, torch.float32)


Ahead = Callable[..., tuple[Tensor, Tensor]]
Back = Callable[..., tuple[Tensor, Tensor, Tensor]]


def _kernels(scale: float, softcap: float | None) -> tuple[Ahead, Back]:
    """(forward, backward) of one part: torch's fused kernel, or plain products with cap or window."""

    def ahead(q: Tensor, k: Tensor, v: Tensor, causal: bool, seen: Tensor | None) -> tuple[Tensor, Tensor]:
        if softcap is None and seen is None:
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q, k, v, 0.0, causal, scale=scale
            )
        return _plain(q, k, v, scale, softcap, _triangle(q, causal, seen))

    def back(
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        causal: bool,
        seen: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if softcap is None and seen is None:
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad, q, k, v, out, lse, 0.0, causal, scale=scale
            )
        return _plain_back(grad, q, k, v, out, lse, scale, softcap, _triangle(q, causal, seen))

    return ahead, back


def _triangle(q: Tensor, causal: bool, seen: Tensor | None) -> Tensor | None:
    if seen is not None or not causal:
        return seen
    return torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()[None, None]


def _logits(
    q: Tensor, k: Tensor, scale: float, softcap: float | None, seen: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """float32 logits [n, K, H / K, queries, keys], and the slope of the soft cap."""
    raw = torch.einsum("nkrqd,nkpd->nkrqp", q, k).to(_exact(q)) * scale
    slope = None
    if softcap is not None:
        capped = torch.tanh(raw / softcap)
        raw, slope = softcap * capped, 1 - capped**2
    return (raw if seen is None else raw.masked_fill(~seen[:, :, None], -math.inf)), slope


def _plain(
    q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None, seen: Tensor | None
) -> tuple[Tensor, Tensor]:
    heads = q.unflatten(1, (k.shape[1], -1))
    logits, _ = _logits(heads, k, scale, softcap, seen)
    lse = logits.logsumexp(-1)
    weights = (logits - lse.masked_fill(lse.isinf(), 0.0)[..., None]).exp()
    out = torch.einsum("nkrqp,nkpd->nkrqd", weights.to(v.dtype), v)
    return out.flatten(1, 2), lse.flatten(1, 2)


def _plain_back(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    softcap: float | None,
    seen: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    grad, q, out, lse = (x.unflatten(1, (k.shape[1], -1)) for x in (grad, q, out, lse))
    logits, slope = _logits(q, k, scale, softcap, seen)
    weights = (logits - lse[..., None]).exp()
    dv = torch.einsum("nkrqp,nkrqd->nkpd", weights.to(v.dtype), grad)
    moved = (
        torch.einsum("nkrqd,nkpd->nkrqp", grad, v).to(_exact(q))
        - (grad * out).sum(-1, dtype=_exact(q))[..., None]
    )
    inner = weights * moved * scale * (1.0 if slope is None else slope)
    dq = torch.einsum("nkrqp,nkpd->nkrqd", inner.to(k.dtype), k).flatten(1, 2)
    dk = torch.einsum("nkrqp,nkrqd->nkpd", inner.to(q.dtype), q)
    return dq, dk, dv
