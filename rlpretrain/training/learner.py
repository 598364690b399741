"""The trained model for objectives with need "learner": rlpretrain/objectives/learner.py says what it does.

Legend: M trunk tokens of a micro-batch, K tokens of each.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rlpretrain.compat import head_of
from rlpretrain.config import ConfigError, PretrainConfig
from rlpretrain.models.lengths import limit_of
from rlpretrain.objectives.learner import Gradient, TokenWeights
from rlpretrain.ranks import Ranks
from rlpretrain.scoring.groups import micro_batches
from rlpretrain.scoring.layout import Layout
from rlpretrain.scoring.scorer import score
from rlpretrain.training.backends.base import trained_parameters
from rlpretrain.types import Batch, Document, Likeliest, MicroBatch

BLOCK = re.compile(r"\.(?:layers|h|blocks?)\.(\d+)\.")
"""The number of a block in the name of a parameter."""


class PolicyLearner:
    """Reads and shifts the weights of a policy that every rank holds whole."""

    def __init__(self, policy: Any, layout: Layout, seed: int):
        self.policy, self.layout, self.seed = policy, layout, seed
        self.ranks: Ranks = policy.ranks
        self.vocabulary = head_of(policy.model).weight.shape[0]
        limit = limit_of(policy.model)
        self.limit = limit.tokens if limit else None

    def parameters(self, subset: str) -> Mapping[str, nn.Parameter]:
        """Trained parameters by name: `all`, `head`, or `last:n` blocks."""
        found = trained_parameters(self.policy.model)
        kind, _, number = subset.partition(":")
        if kind == "head":
            head = {id(p) for p in self.policy.model.get_output_embeddings().parameters()}
            found = {name: p for name, p in found.items() if id(p) in head}
        elif kind == "last":
            names = [name for name, _ in self.policy.model.named_parameters()]
            blocks = {name: int(match[1]) for name in names if (match := BLOCK.search(name))}
            first = max(blocks.values(), default=0) + 1 - int(number)
            found = {name: p for name, p in found.items() if blocks.get(name, -1) >= max(first, 0)}
        if not found:
            raise ConfigError(
                f"objective.subset {subset}: the model has no trained parameters there; use all"
            )
        return found

    @torch.no_grad()
    def likeliest(self, micro: MicroBatch, count: int, temperature: float = 1.0) -> Likeliest:
        """The `count` likeliest tokens [M, K] of each prediction, and the document token's own log-prob."""
        logps, ids = self._read(micro, "likeliest, label first", temperature=temperature, count=count)
        return Likeliest(ids, logps[:, 1:], logps[:, 0])

    @torch.no_grad()
    def candidate_logps(self, micro: MicroBatch, ids: Tensor) -> Tensor:
        """Log-probs [M, K] of the tokens `ids` [M, K]; 0 for the id −100."""
        _, logps = self._read(micro, "candidates", candidates=ids)
        return logps

    def _read(self, micro: MicroBatch, want: str, temperature: float = 1.0, **more: Any) -> Any:
        """What the scorer reads at the document tokens."""
        micro = micro.to(self.ranks.device)
        rows, labels = micro.trunk_rows, micro.trunk_labels
        inputs = (micro.input_ids, micro.attention_mask, micro.position_ids, rows, labels, temperature)
        if "candidates" in more:
            more = {"candidates": more["candidates"].to(self.ranks.device), "want_rows": (0, len(rows))}
        return self.policy.scorer(*inputs, want, micro.tree, **more)

    @torch.no_grad()
    def loss(self, documents: Sequence[Document], weights: TokenWeights) -> float:
        """The weighted mean of −log p over the document tokens of all ranks; NaN if no token has weight."""
        total = weight = 0.0
        for loss, amount in self._losses(documents, weights):
            total, weight = total + float(loss), weight + amount
        total, weight = self.ranks.sum([total, weight])
        return total / weight if weight else float("nan")

    def gradient(
        self, documents: Sequence[Document], weights: TokenWeights, parameters: Mapping[str, nn.Parameter]
    ) -> Gradient:
        """That loss with its gradient. `autograd.grad` leaves the gradient of the step alone."""
        sums = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
        total = weight = 0.0
        with torch.enable_grad():
            for loss, amount in self._losses(documents, weights):
                parts = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
                for name, part in zip(parameters, parts, strict=True):
                    if part is not None:
                        sums[name] += part
                total, weight = total + float(loss.detach()), weight + amount
        self.sum(sums.values())
        total, weight = self.ranks.sum([total, weight])
        if not weight:
            return Gradient(float("nan"), sums)
        for part in sums.values():
            part /= weight
        return Gradient(total / weight, sums)

    def _losses(self, documents: Sequence[Document], weights: TokenWeights) -> Iterator[tuple[Tensor, float]]:
        """(sum of weight × −log p, sum of weights) of each micro-batch with documents."""
        for micro in micro_batches(Batch((), tuple(documents)), self.layout):
            given = weights(micro).to(self.ranks.device)
            logps = score(self.policy.scorer, micro.to(self.ranks.device)).trunk_logps
            yield -(given * logps).sum(), float(given.sum())

    @contextmanager
    def shifted(self, direction: Mapping[str, Tensor], by: float) -> Iterator[float]:
        """Move the weights, and copy them back: subtracting the move again would leave rounding errors."""
        parameters = trained_parameters(self.policy.model)
        moved = {name: parameters[name] for name in direction}
        kept = {name: p.detach().clone() for name, p in moved.items()}
        try:
            with torch.no_grad():
                for name, p in moved.items():
                    p.add_(direction[name].to(p), alpha=by)
                lengths = [torch.linalg.vector_norm(p - kept[name]) for name, p in moved.items()]
            yield float(torch.linalg.vector_norm(torch.stack(lengths)))
        finally:
            with torch.no_grad():
                for name, p in moved.items():
                    p.copy_(kept[name])

    def sum(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over all ranks."""
        if self.ranks.size > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)


def make_learner(objective: Any, policy: Any, layout: Layout, seed: int) -> PolicyLearner | None:
    """The learner for an objective that needs it, which starts here; else None."""
    if "learner" not in objective.needs:
        return None
    learner = PolicyLearner(policy, layout, seed)
    objective.start(learner)
    return learner


def check_learner(config: PretrainConfig, owner: type, stage: int) -> None:
    """Raise ConfigError for settings with which a model can be neither shifted nor read exactly.

    `stage` is that of ZeRO, and 3 under FSDP.
    """
    if stage >= 2:
        sharded = f"policy.zero_stage {stage}"
        if config.policy.deepspeed_config:
            sharded = f"policy.deepspeed_config (ZeRO {stage})"
        elif config.policy.backend == "fsdp":
            sharded = "policy.backend fsdp"
        raise ConfigError(
            f"{sharded}: objective {owner.__name__} reads gradients and shifts the weights of the whole "
            "model, which it shards: use ZeRO 0 or 1, or policy.backend torch"
        )
    if config.model.dtype != "float32":
        raise ConfigError(
            f"model.dtype {config.model.dtype}: objective {owner.__name__} shifts weights by about a "
            "thousandth, which half precision rounds away: set float32 (policy.autocast may be bfloat16)"
        )
    if config.model.quantization != "none":
        raise ConfigError(
            f"model.quantization {config.model.quantization}: objective {owner.__name__} takes differences "
            "of log-probs, which were not tried on quantised weights: set none"
        )
