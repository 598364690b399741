"""The compute of a run: tokens that models read to score, train or sample, and operations.

Counted are

- all forwards of the policy: training in every inner epoch, the scoring pass before it, entropies, and the
  probe of other engines;
- forwards of frozen and averaged models, and of an objective's own proxy;
- what engines read and write: each prompt once, each thought, each text that is sampled after a thought
  (with everything before it as context), groups that are dropped later, and the policy as a judge.

Not counted are evaluation, checks at the start, the second forward of gradient checkpointing, and models
behind a URL.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

from torch import Tensor, nn

from rollout.types import Prompt, SamplingParams, Thought


@dataclass(slots=True)
class Reads:
    """Tokens that a model read, and pairs of tokens that its attention compared.

    Forwards with gradient are counted separately, in `trained_tokens` and `trained_pairs`.
    """

    tokens: float = 0.0
    pairs: float = 0.0
    trained_tokens: float = 0.0
    trained_pairs: float = 0.0

    def add(self, length: int, behind: int = 0) -> None:
        """Count a row of `length` tokens after `behind` tokens that were counted before."""
        self.tokens += length
        self.pairs += length * behind + length * (length + 1) / 2

    def add_forward(self, tokens: float, pairs: float, trained: bool) -> None:
        """Count a forward of a batch."""
        if trained:
            self.trained_tokens += tokens
            self.trained_pairs += pairs
        else:
            self.tokens += tokens
            self.pairs += pairs

    def merge(self, other: Reads) -> None:
        """Add the counts of another."""
        for name, value in zip(self.__dataclass_fields__, astuple(other), strict=True):
            setattr(self, name, getattr(self, name) + value)

    def take(self) -> Reads:
        """Return the counts since the last call, and start again from 0."""
        counts = Reads(*astuple(self))
        self.tokens = self.pairs = self.trained_tokens = self.trained_pairs = 0.0
        return counts


@dataclass(frozen=True, slots=True)
class Size:
    """The size of a model, for counting operations."""

    parameters: int
    trained: int
    """Parameters that are trained."""
    attention: int
    """Width of attention (heads × head dimension), summed over layers."""

    def operations(self, reads: Reads) -> float:
        """Return the operations of these reads.

        A forward takes 2 per parameter and token, and 4 per attention width and pair. A backward takes 2 per
        parameter and token for the activations, 2 per trained parameter and token for its gradient, and twice
        the forward's attention.
        """
        forward = 2 * self.parameters * (reads.tokens + reads.trained_tokens)
        backward = 2 * (self.parameters + self.trained) * reads.trained_tokens
        return forward + backward + 4 * self.attention * (reads.pairs + 3 * reads.trained_pairs)


@dataclass(frozen=True, slots=True)
class Widths:
    """Widths of a decoder layer; 0 for attention that the model does not have."""

    hidden: int
    queries: int
    keys: int
    """Also that of the values."""
    mlp: int


def widths_of(text_config: Any) -> Widths:
    """Return the widths of a decoder layer, by the configuration of the language part of a model."""
    hidden = getattr(text_config, "hidden_size", 0)
    heads = getattr(text_config, "num_attention_heads", 0) or 0
    head_dim = getattr(text_config, "head_dim", None) or (hidden // heads if heads else 0)
    kv_heads = getattr(text_config, "num_key_value_heads", None) or heads
    mlp = getattr(text_config, "intermediate_size", None) or 4 * hidden
    return Widths(hidden, heads * head_dim, kv_heads * head_dim, mlp)


def size_of(model: nn.Module, parameters: int) -> Size:
    """Return the size of a model with `parameters` parameters, as `models.count_parameters` counts them."""
    config: Any = model.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    layers = getattr(config, "num_hidden_layers", 0) or 0
    trained = parameters
    if not all(p.requires_grad for p in model.parameters()):
        trained = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)
    return Size(parameters, trained, layers * widths_of(config).queries)


def read_by(
    input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor | None, tree: Any
) -> tuple[float, float]:
    """Return the tokens and pairs of a forward.

    In a tree, each token attends to the tokens on its path, and its position id is their number.
    """
    if tree is not None and position_ids is not None:
        return float(input_ids.numel()), float((position_ids + 1).sum())
    lengths = attention_mask.sum(1).double()
    return float(lengths.sum()), float((lengths * (lengths + 1) / 2).sum())


class Metered:
    """An engine that counts the tokens it reads and writes; all other attributes are those of the engine."""

    def __init__(self, engine: Any):
        self.engine, self.reads = engine, Reads()

    async def sample(
        self, prompts: Sequence[Prompt], params: SamplingParams, n: int, seeds: Sequence[int]
    ) -> list[list[Thought]]:
        """Sample with the engine; count each prompt once, and each thought after it."""
        thoughts_per_prompt = await self.engine.sample(prompts, params, n, seeds)
        for prompt, thoughts in zip(prompts, thoughts_per_prompt, strict=True):
            prompt_length = len(prompt.token_ids)
            self.reads.add(prompt_length)
            for thought in thoughts:
                self.reads.add(len(thought.token_ids), prompt_length)
        return thoughts_per_prompt

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)
