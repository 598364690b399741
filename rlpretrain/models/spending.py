"""The compute of a run: tokens that models read to score, train or sample, and operations.

Counted are

- all forwards of the policy: training in every inner epoch, the scoring pass before it, entropies, and the
  probe of other engines;
- forwards of frozen and averaged models, and of an objective's own proxy;
- what engines read and write: each prompt once, each thought, each text that is sampled after a thought
  (with everything before it as context), groups that are dropped later, and the policy as a judge.

Not counted are evaluation, checks at the start, everything that is computed a second time (the forward of
gradient checkpointing, the logits in the head's backward), and models behind a URL. Only matrix products and
attention count; a layer with a sliding window counts as if it had none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rollout.types import Prompt, SamplingParams, Thought


@dataclass(slots=True)
class Reads:
    """What a model read: tokens, pairs of tokens that its attention compared, and rows of its head.

    A row of the head is a state from which the next token is predicted. Forwards with gradient are counted
    separately, in the fields that begin with `trained`.
    """

    tokens: float = 0.0
    pairs: float = 0.0
    rows: float = 0.0
    trained_tokens: float = 0.0
    trained_pairs: float = 0.0
    trained_rows: float = 0.0

    def add(self, length: int, behind: int = 0, rows: int | None = None) -> None:
        """Count `length` tokens after `behind` tokens that were counted before; by default all are rows."""
        self.add_forward(
            length, length * behind + length * (length + 1) / 2, length if rows is None else rows
        )

    def add_forward(self, tokens: float, pairs: float, rows: float, trained: bool = False) -> None:
        """Count a forward of a batch."""
        if trained:
            self.trained_tokens += tokens
            self.trained_pairs += pairs
            self.trained_rows += rows
        else:
            self.tokens += tokens
            self.pairs += pairs
            self.rows += rows

    def merge(self, other: Reads) -> None:
        """Add the counts of another."""
        for name, value in zip(self.__dataclass_fields__, astuple(other), strict=True):
            setattr(self, name, getattr(self, name) + value)

    def take(self) -> Reads:
        """Return the counts since the last call, and start again from 0."""
        counts = Reads(*astuple(self))
        for name in self.__dataclass_fields__:
            setattr(self, name, 0.0)
        return counts


@dataclass(frozen=True, slots=True)
class Size:
    """The size of a model, for counting operations."""

    matrices: float
    """Parameters of the matrices that multiply every token; of experts, those that a token is sent to."""
    trained: float
    """Those of them that are trained."""
    head: int
    """Parameters of the output head, which multiplies rows."""
    trained_head: int
    """The same, or 0 if the head is not trained."""
    attention: int
    """Width of attention (heads × head dimension), summed over layers."""

    def operations(self, reads: Reads) -> float:
        """Return the operations of these reads.

        A forward takes 2 per parameter and token, and 4 per attention width and pair. A backward takes 2 per
        parameter and token for the activations, 2 per trained parameter and token for its gradient, and twice
        the forward's attention. In the head, rows take the place of tokens.
        """
        forward = self.matrices * (reads.tokens + reads.trained_tokens)
        forward += self.head * (reads.rows + reads.trained_rows)
        backward = (self.matrices + self.trained) * reads.trained_tokens
        backward += (self.head + self.trained_head) * reads.trained_rows
        return 2 * (forward + backward) + 4 * self.attention * (reads.pairs + 3 * reads.trained_pairs)


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


def size_of(model: nn.Module) -> Size:
    """Return the size of a model.

    Embeddings are looked up, so they count only where the head is tied to them. Vectors (norms, biases) do
    not count.
    """
    causal: Any = model
    config: Any = causal.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    layer = causal.get_output_embeddings()
    rows = getattr(layer, "token_adapter", None)  # PEFT's trained rows; its `weight` would merge them
    head = getattr(layer if rows is None else rows.get_base_layer(), "weight", None)
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)} | {id(head)}
    used_share = _share_of_experts(config)
    matrices = trained = 0.0
    for name, parameter in model.named_parameters():
        if id(parameter) in tables or is_vector(parameter) or ".trainable_tokens_" in name:
            continue
        size = count_elements(parameter) * (used_share if ".experts." in name else 1.0)
        matrices += size
        trained += size * parameter.requires_grad
    head_size = 0 if head is None else count_elements(head)
    is_trained = head is not None and (head.requires_grad or rows is not None)
    trained_head = head_size if is_trained else 0
    width = widths_of(config).queries * _count_attention_layers(config)
    return Size(matrices, trained, head_size, trained_head, width)


def count_elements(parameter: Tensor) -> int:
    """Return the full size of a parameter: of a sharded one, and of one in nf4, whose bytes hold two."""
    size = getattr(parameter, "ds_numel", parameter.numel())
    return 2 * size if parameter.dtype == torch.uint8 else size


def is_vector(parameter: Tensor) -> bool:
    """Return whether a parameter has less than two dimensions, under ZeRO 3 too."""
    return len(getattr(parameter, "ds_shape", parameter.shape)) < 2


def _share_of_experts(config: Any) -> float:
    """Return the share of a layer's experts that a token is sent to; 1 for a model without experts."""
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    experts = next((getattr(config, name) for name in names if getattr(config, name, None)), 0)
    return min(1.0, (getattr(config, "num_experts_per_tok", None) or experts) / experts) if experts else 1.0


def _count_attention_layers(config: Any) -> int:
    """Return the number of layers with attention between all pairs of tokens."""
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return getattr(config, "num_hidden_layers", 0) or 0
    return sum(kind.endswith("attention") and kind != "linear_attention" for kind in kinds)


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
            self.reads.add(prompt_length, rows=1)
            for thought in thoughts:
                self.reads.add(len(thought.token_ids), prompt_length)
        return thoughts_per_prompt

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)
