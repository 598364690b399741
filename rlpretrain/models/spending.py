"""What a run spends: every token that a model reads, to score, to train or to sample, and the operations that
it takes.

Counted are all forwards of the policy (training in every inner epoch, the scoring pass before it, entropies,
the probe of other engines), those of frozen and averaged models and of an objective's own proxy, and what
engines read and write: each prompt once, each thought, what is said after it behind all that stands before
it, groups that are left out later, and a judge that is the policy itself. Not counted are evaluation, checks
at the start, the second forward of gradient checkpointing, and models behind a URL.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

from torch import Tensor, nn

from rollout.types import Prompt, SamplingParams, Thought


@dataclass(slots=True)
class Reads:
    """Tokens that a model read, and the pairs of tokens that its attention compared; those with gradient
    apart.
    """

    tokens: float = 0.0
    pairs: float = 0.0
    trained_tokens: float = 0.0
    trained_pairs: float = 0.0

    def add(self, length: int, behind: int = 0) -> None:
        """A row of `length` tokens, read behind `behind` others that were read before."""
        self.tokens += length
        self.pairs += length * behind + length * (length + 1) / 2

    def add_forward(self, tokens: float, pairs: float, trained: bool) -> None:
        """A forward of a batch."""
        if trained:
            self.trained_tokens += tokens
            self.trained_pairs += pairs
        else:
            self.tokens += tokens
            self.pairs += pairs

    def merge(self, other: Reads) -> None:
        """Add what another counted."""
        for name, value in zip(self.__dataclass_fields__, astuple(other), strict=True):
            setattr(self, name, getattr(self, name) + value)

    def take(self) -> Reads:
        """What was counted since the last time."""
        found = Reads(*astuple(self))
        self.tokens = self.pairs = self.trained_tokens = self.trained_pairs = 0.0
        return found


@dataclass(frozen=True, slots=True)
class Size:
    """Parameters of a model, those of them that are trained, and the width of its attention over all
    layers.
    """

    parameters: int
    trained: int
    attention: int

    def operations(self, reads: Reads) -> float:
        """2 N a token and 4 widths a pair for a forward; a backward goes through all N for activations,
        through the trained for their gradients, and twice through attention.
        """
        forward = 2 * self.parameters * (reads.tokens + reads.trained_tokens)
        backward = 2 * (self.parameters + self.trained) * reads.trained_tokens
        return forward + backward + 4 * self.attention * (reads.pairs + 3 * reads.trained_pairs)


def size_of(model: nn.Module, parameters: int) -> Size:
    """The size of a model with so many parameters (sharded and rounded ones as if whole)."""
    config: Any = model.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    heads, layers = (
        getattr(config, "num_attention_heads", 0) or 0,
        getattr(config, "num_hidden_layers", 0) or 0,
    )
    head = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0)
    sizes = [(p.requires_grad, getattr(p, "ds_numel", p.numel())) for p in model.parameters()]
    frozen = any(not trained for trained, _ in sizes)
    return Size(
        parameters, sum(n for trained, n in sizes if trained) if frozen else parameters, layers * heads * head
    )


def read_by(
    input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor | None, tree: Any
) -> tuple[float, float]:
    """Tokens and pairs of a forward; in a tree each token meets those on its own path, as many as its
    position says.
    """
    if tree is not None and position_ids is not None:
        return float(input_ids.numel()), float((position_ids + 1).sum())
    lengths = attention_mask.sum(1).double()
    return float(lengths.sum()), float((lengths * (lengths + 1) / 2).sum())


class Metered:
    """An engine that counts what it reads and writes; everything else is the engine's own."""

    def __init__(self, engine: Any):
        self.engine, self.reads = engine, Reads()

    async def sample(
        self, prompts: Sequence[Prompt], params: SamplingParams, n: int, seeds: Sequence[int]
    ) -> list[list[Thought]]:
        """The engine's thoughts: each prompt is read once, each thought behind it."""
        found = await self.engine.sample(prompts, params, n, seeds)
        for prompt, thoughts in zip(prompts, found, strict=True):
            before = len(prompt.token_ids)
            self.reads.add(before)
            for thought in thoughts:
                self.reads.add(len(thought.token_ids), before)
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)
