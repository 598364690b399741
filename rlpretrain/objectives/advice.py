"""Advice about the tokens that a learner may be trained on: how much each lowers a loss elsewhere.

With g the gradient of that loss, the advice about token j in place t is the rise of log p after a small step
against g,

    a_tj = −g · ∇ log p_θ(j) = [log p_{θ−εg}(j) − log p_{θ+εg}(j)] / 2ε + O(ε²),

from two forwards (arXiv 2601.22108 has it as a second derivative: the loss is linear in its targets, so both
are the same). Legend: M document tokens of a micro-batch, C candidates of each.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rewards.tiled_logps import IGNORE
from rlpretrain.config import ConfigError, DataConfig
from rlpretrain.data.document_source import DocumentSource, SourceInputs
from rlpretrain.data.stream import open_source
from rlpretrain.objectives.learner import Gradient, Learner
from rlpretrain.types import MicroBatch


@dataclass(frozen=True, slots=True)
class Candidates:
    """The tokens that each document token may be trained on; the first is the document token itself."""

    ids: Tensor  # [M, C] int64; −100 where one of the likeliest is the document token, which is there already
    logps: Tensor  # [M, C] nats under the learner; 0 for −100

    @property
    def mask(self) -> Tensor:
        """[M, C] bool, true for candidates."""
        return self.ids != IGNORE

    @property
    def probs(self) -> Tensor:
        """[M, C] the learner's probabilities, divided by their sum."""
        return self.softmax(self.logps)

    def softmax(self, scores: Tensor) -> Tensor:
        """Probabilities [M, C] from scores [M, C]."""
        return scores.masked_fill(~self.mask, -torch.inf).softmax(-1)


@dataclass(frozen=True, slots=True)
class Advice:
    """The advice [M, C] of each micro-batch, 0 where there is no candidate, and the norm of its direction."""

    values: Sequence[Tensor]
    norm: float


def find_candidates(learner: Learner, micro: MicroBatch, count: int) -> Candidates:
    """The learner's `count` likeliest tokens and the document's own: 1 + count columns."""
    top = learner.likeliest(micro, count)
    assert top.own_logps is not None, "the trained model gives them"
    own = micro.trunk_labels.to(top.ids.device)[:, None]
    repeated = top.ids == own
    ids = torch.cat([own, top.ids.masked_fill(repeated, IGNORE)], 1)
    return Candidates(ids, torch.cat([top.own_logps[:, None], top.logps.masked_fill(repeated, 0.0)], 1))


def open_labelled(learner: Learner, section: str, data: DataConfig, tokenizer: Any) -> DocumentSource:
    """This rank's stream of labelled documents; ConfigError that names the section if there can be none."""
    ranks = learner.ranks
    inputs = SourceInputs(
        config=data, tokenizer=tokenizer, rank=ranks.rank, world_size=ranks.size, seed=learner.seed
    )
    try:
        source = open_source(inputs, section)
    except ConfigError as error:
        raise ConfigError(f"{section}: {error}") from None
    if learner.limit is not None and source.longest > learner.limit:
        raise ConfigError(
            f"{section} has documents of {source.longest} tokens, but the model has {learner.limit} "
            f"positions: lower {section}.max_length"
        )
    return source


def answer_weights(micro: MicroBatch) -> Tensor:
    """1 for each token [M] of an answer, and for all tokens of a document without one; else 0."""
    weights = [torch.arange(1, len(d.token_ids)) >= (d.answer_at or 0) for d in micro.documents]
    return torch.cat([*weights, torch.zeros(0)]).float()


def take_advice(
    learner: Learner,
    micros: Sequence[MicroBatch],
    candidates: Sequence[Candidates],
    gradient: Gradient,
    parameters: Mapping[str, nn.Parameter],
    ratio: float,
    generator: torch.Generator | None = None,
) -> tuple[Advice | None, dict[str, float]]:
    """(the advice, numbers for the log); no advice if the gradient is not finite.

    `ratio` is ε‖g‖ / ‖θ‖ over these parameters. `generator` draws another direction of the same norm: it must
    be equal on all ranks. A gradient of 0 gives an advice of 0.
    """
    direction, norm = gradient.values, length(gradient.values.values())
    if not math.isfinite(norm) or not math.isfinite(gradient.loss):
        return None, {"feedback/skipped_frac": 1.0}
    numbers = {"feedback/skipped_frac": 0.0, "feedback/gradient_norm": norm}
    if not norm:
        return Advice([torch.zeros_like(found.logps) for found in candidates], 0.0), numbers
    if generator is not None:
        direction = random_direction(direction, norm, generator)
    size = length(p.detach() for p in parameters.values())
    epsilon = ratio * size / norm
    logps: list[list[Tensor]] = []
    for by in (-epsilon, epsilon):
        with learner.shifted(direction, by) as moved:
            pairs = zip(micros, candidates, strict=True)
            logps.append([learner.candidate_logps(micro, found.ids) for micro, found in pairs])
        numbers["feedback/shift"] = moved / size
    values = [(down.double() - up.double()) / (2 * epsilon) for down, up in zip(*logps, strict=True)]
    return Advice([value.float() for value in values], norm), numbers


def random_direction(
    like: Mapping[str, Tensor], norm: float, generator: torch.Generator
) -> Mapping[str, Tensor]:
    """Gaussian tensors in these shapes, of this norm together; the same on every device."""
    drawn = {name: torch.randn(value.shape, generator=generator) for name, value in like.items()}
    factor = norm / length(drawn.values())
    return {name: (factor * value).to(like[name]) for name, value in drawn.items()}


def deviation(learner: Learner, candidates: Sequence[Candidates], advice: Advice) -> float:
    """The standard deviation of the advice within places, under the learner's probabilities, over all ranks.

    What a place adds to the advice about all of its candidates changes no target, so it does not count.
    """
    total = count = 0.0
    for found, values in zip(candidates, advice.values, strict=True):
        probs, of_place = found.probs.double(), values.double()
        mean = (probs * of_place).sum(-1, keepdim=True)
        total += float((probs * (of_place - mean) ** 2).sum())
        count += len(values)
    total, count = learner.ranks.sum([total, count])
    return math.sqrt(total / max(count, 1))


@dataclass(frozen=True, slots=True)
class Mixture:
    """The targets of a micro-batch."""

    q: Tensor  # [M, C]
    alpha: Tensor  # [M]
    gate: Tensor  # [M], open from 0 to 1; 1 without a designer


def mix(probs: Tensor, alpha: Tensor, gate: Tensor) -> Mixture:
    """q = (1 − α) δ + α p [M, C]: δ is the first column, which is the document token."""
    own = torch.zeros_like(probs)
    own[:, 0] = 1.0
    weight = alpha[:, None]
    return Mixture((1 - weight) * own + weight * probs, alpha, gate)


def describe(learner: Learner, mixtures: Sequence[Mixture], advice: Advice | None) -> dict[str, float]:
    """Means over the step's document tokens on all ranks: of the targets, and their value."""
    names = ("alpha", "off_mass", "entropy", "open_frac")
    sums = {f"targets/{name}": 0.0 for name in names}
    if advice is not None:
        sums |= {"feedback/value": 0.0, "feedback/value_ntp": 0.0}
    tokens = 0.0
    for i, mixture in enumerate(mixtures):
        q = mixture.q.double()
        tokens += len(q)
        sums["targets/alpha"] += float(mixture.alpha.double().sum())
        sums["targets/off_mass"] += float(q[:, 1:].sum())
        sums["targets/entropy"] -= float(torch.special.xlogy(q, q).sum())
        sums["targets/open_frac"] += float((mixture.gate > 0.95).sum())
        if advice is not None:
            sums["feedback/value"] += float((q * advice.values[i]).sum())
            sums["feedback/value_ntp"] += float(advice.values[i][:, 0].double().sum())
    tokens, *totals = learner.ranks.sum([tokens, *sums.values()])
    return {name: total / max(tokens, 1) for name, total in zip(sums, totals, strict=True)}


def length(tensors: Iterable[Tensor]) -> float:
    """The norm of several tensors together."""
    norms = [torch.linalg.vector_norm(tensor.float()) for tensor in tensors]
    return float(torch.linalg.vector_norm(torch.stack(norms)))
