"""The trained model as an objective sees it: what `start` and `before_step` are given on need "learner"."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from rlpretrain.ranks import Ranks
from rlpretrain.types import Document, Likeliest, MicroBatch

TokenWeights = Callable[[MicroBatch], Tensor]
"""Weights [M] of the document tokens of a micro-batch in a loss."""


@dataclass(frozen=True, slots=True)
class Gradient:
    """A loss on documents of all ranks, and its gradient, the same on every rank."""

    loss: float
    """Nats per unit of weight."""
    values: Mapping[str, Tensor]
    """By the parameters' names, in their shapes, in float32."""


class Learner(Protocol):
    """The trained model. All ranks call each method together; none changes the gradient of the step.

    Forwards run in the precision of the weights, without `policy.autocast`, and count as compute of the run.
    """

    ranks: Ranks
    seed: int
    """The run's seed."""
    vocabulary: int
    """Rows of the output head."""
    limit: int | None
    """Tokens of the longest row; None where the model has no limit."""

    def parameters(self, subset: str) -> Mapping[str, nn.Parameter]:
        """Trained parameters by name: `all` (under LoRA the adapters), `head`, or `last:n` blocks.

        Raises ConfigError for a subset without trained parameters.
        """
        ...

    def likeliest(self, micro: MicroBatch, count: int, temperature: float = 1.0) -> Likeliest:
        """The `count` likeliest tokens [M, K] of each prediction, and the document token's own log-prob."""
        ...

    def candidate_logps(self, micro: MicroBatch, ids: Tensor) -> Tensor:
        """Log-probs [M, K] of the tokens `ids` [M, K] in place of each document token; 0 for the id −100."""
        ...

    def loss(self, documents: Sequence[Document], weights: TokenWeights) -> float:
        """The weighted mean of −log p over the document tokens of all ranks; NaN if no token has weight."""
        ...

    def gradient(
        self, documents: Sequence[Document], weights: TokenWeights, parameters: Mapping[str, nn.Parameter]
    ) -> Gradient:
        """That loss with its gradient for these parameters; 0 for those that it does not depend on."""
        ...

    def shifted(self, direction: Mapping[str, Tensor], by: float) -> AbstractContextManager[float]:
        """Within it the weights are moved by `by` times `direction`; afterwards they are bit-identical again.

        Gives the length of the move in the weights' own precision.
        """
        ...

    def sum(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over all ranks."""
        ...
