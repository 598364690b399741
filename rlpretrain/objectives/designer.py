"""The designer of V-Pretraining: a small causal transformer that weighs candidate tokens (arXiv 2601.22108).

The paper's has 6 layers of width 256 with 4 heads; it sees the context and the embedding of the true next
token, and gives a score for each of K given tokens, and a gate. Here it reads the document up to and with the
token that is predicted. Its own table of embeddings serves as input and for the candidates, and its positions
are sinusoids: our choice, as is the start, with scores of 0 and open halfway.

Legend: D documents, S tokens of the longest, M document tokens, C candidates of each, W width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional

from rlpretrain.models.spending import Reads
from rlpretrain.objectives.learner import Learner


class Block(nn.Module):
    """A decoder layer with norms before attention and MLP."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, states: Tensor) -> Tensor:
        """States [D, S, W] to states; each place attends to itself and to what is before it."""
        parts = self.qkv(self.before_attention(states)).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        read = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        states = states + self.out(read.transpose(1, 2).flatten(2))
        return states + self.mlp(self.before_mlp(states))


class Designer(nn.Module):
    """Scores of candidates and gates, from whole documents."""

    def __init__(self, vocabulary: int, width: int, layers: int, heads: int):
        super().__init__()
        self.table = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.query, self.gate = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, 1)
        for layer in (self.query, self.gate):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.reads = Reads()
        self.config = SimpleNamespace(
            hidden_size=width,
            num_attention_heads=heads,
            num_hidden_layers=layers,
            intermediate_size=4 * width,
        )

    @property
    def model(self) -> Designer:
        """Itself: a run counts the operations of `Objective.proxy.model` by what it `reads`."""
        return self

    def get_output_embeddings(self) -> None:
        """None: it has no head over the vocabulary."""
        return None

    def forward(self, documents: Sequence[Sequence[int]], ids: Tensor) -> tuple[Tensor, Tensor]:
        """(scores [M, C] of the tokens `ids` [M, C], gates [M] before the sigmoid).

        M counts the tokens of all documents but the first of each, in their order.
        """
        sizes = [len(document) for document in documents]
        if not sizes:
            none = self.gate.bias.sum() * 0.0
            return none.expand(ids.shape), none.expand(len(ids))
        rows = torch.zeros(len(sizes), max(sizes), dtype=torch.int64)
        inside = torch.zeros(rows.shape, dtype=torch.bool)
        for row, document in enumerate(documents):
            rows[row, : sizes[row]] = torch.as_tensor(document)
            inside[row, 1 : sizes[row]] = True
            self._count(sizes[row])
        width = self.table.embedding_dim
        rows, inside = rows.to(ids.device), inside.to(ids.device)
        states = self.table(rows) + positions(rows.shape[1], width).to(ids.device)
        for block in self.blocks:
            states = block(states)
        states = self.norm(states[inside])
        scores = torch.einsum("mw,mcw->mc", self.query(states), self.table(ids)) / math.sqrt(width)
        return scores, self.gate(states)[:, 0]

    def _count(self, size: int) -> None:
        pairs = size * (size + 1) / 2
        self.reads.add_forward(size, pairs, 0, trained=torch.is_grad_enabled())


def take_step(designer: Designer, optimizer: torch.optim.Optimizer, learner: Learner) -> float:
    """Add up the gradients of all ranks, clip them to norm 1, step, and clear; the norm before clipping.

    A gradient that is not finite changes nothing.
    """
    parameters = list(designer.parameters())
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    learner.sum(gradients)
    for p, gradient in zip(parameters, gradients, strict=True):
        p.grad = gradient
    norm = float(nn.utils.clip_grad_norm_(parameters, 1.0))
    if math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def positions(size: int, width: int) -> Tensor:
    """Sinusoids [S, W] of the places 0 to S − 1 (arXiv 1706.03762, §3.5)."""
    rates = torch.exp(torch.arange(0, width, 2) * (-math.log(10_000.0) / width))
    angles = torch.arange(size)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(1)[:, :width]
