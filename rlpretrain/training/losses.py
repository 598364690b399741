"""The terms of the loss: each is a sum over one micro-batch, and counts its own denominator.

A term is one of `TERMS`, or a user's own subclass of `Loss` by its path `package.module:Class`. `loss.terms`
names the terms of a run; by default they are those of the objective (`Objective.losses`). Legend: B
positions, G thoughts, L thought tokens, T target tokens, M trunk tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from rewards import importance_ratio
from rlpretrain.config import LossConfig
from rlpretrain.config.plugins import find
from rlpretrain.objectives.base import Objective
from rlpretrain.training.advantages import Advantages
from rlpretrain.types import MicroBatch, Scores


def clipped_surrogate(
    scores: Scores,
    micro: MicroBatch,
    advantage: Float[Tensor, "B G"],
    config: LossConfig,
    old_logps: Float[Tensor, "B G L"] | None = None,
    *,
    weigh: bool = True,
) -> tuple[Tensor, dict[str, float]]:
    """Minus RLP's clipped policy-gradient objective (arXiv 2510.01265, eq. 8), and diagnostics.

    The clipping is PPO's (arXiv 1707.06347). Each thought token has the weight `micro.token_weights` (1/|c|
    for RLP, 1 for a policy gradient: `loss.reduction`). The ratio is taken against `old_logps`; None means
    this forward, with a ratio of exactly 1. Tokens that another engine or an older policy sampled are also
    weighted by the truncated exp(old - behaviour); given thoughts never are, and none is with `weigh` False.
    Only log-probs of thought tokens carry gradient.
    """
    new = scores.thought_logps
    old = new.detach() if old_logps is None else old_logps
    weight = micro.token_weights
    info: dict[str, float] = {}
    if not micro.on_policy:
        sampled = micro.thought_mask & ~micro.given[:, :, None]
        sampling = importance_ratio(old, micro.behaviour_logps, sampled, cap=config.importance_cap)
        if weigh:
            weight = weight * torch.where(sampled, sampling.truncated, 1.0)
        info = {f"sampling/{k}": float(v) for k, v in sampling.diagnostics.items()}
    ratio = torch.exp(new - old)
    bounded = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    gain = advantage.to(new.dtype)[:, :, None]
    objective = torch.minimum(ratio * gain, bounded * gain)
    if old_logps is not None and bool(micro.thought_mask.any()):
        clipped = ((ratio * gain > bounded * gain) & micro.thought_mask).sum() / micro.thought_mask.sum()
        info["clip_ratio/region_mean"] = float(clipped)
    return -(objective * weight * micro.thought_mask).sum(), info


def target_loss(scores: Scores, weights: Float[Tensor, "B G T"]) -> Tensor:
    """Sum of weights × −log p(target | context, thought): the direct term (reader, VeriFree, JEPO).

    RLP's paper does not have it.
    """
    counted = scores.target_mask[:, None, :] & scores.counted[:, :, None]
    return -(weights * scores.target_logps * counted).sum()


def ntp_loss(scores: Scores, weights: Float[Tensor, " M"]) -> Tensor:
    """Sum of weights × −log p(token | document so far) over the trunk: next-token prediction, interleaved."""
    return -(weights * scores.trunk_logps).sum()


@dataclass(frozen=True, slots=True)
class LossInputs:
    """What a term of the loss may use: one micro-batch with its scores, rewards and advantages."""

    scores: Scores
    micro: MicroBatch
    thoughts: Advantages | None  # None in a micro-batch without groups
    objective: Objective
    config: LossConfig


@dataclass(frozen=True, slots=True)
class LossOutput:
    """A sum over the micro-batch, with its graph, and numbers for the log.

    `metrics` whose names end in "loss" are divided by the same count as the sum.
    """

    loss: Tensor
    metrics: dict[str, float] = field(default_factory=dict)


class Loss:
    """One term of the loss. A subclass defines its sum over a micro-batch, and the sum's denominator."""

    def count(self, micro: MicroBatch) -> float:
        """This micro-batch's part of the denominator, by default its thoughts.

        The parts are added up over the whole step and all ranks.
        """
        return float(micro.counted.sum())

    def __call__(self, inputs: LossInputs) -> LossOutput | None:
        """The term's sum; None where the micro-batch has nothing for it."""
        raise NotImplementedError


class Surrogate(Loss):
    """The clipped policy-gradient objective on the tokens of the thoughts, times `loss.policy_coef`."""

    def __call__(self, inputs: LossInputs) -> LossOutput | None:
        thoughts = inputs.thoughts
        if thoughts is None:
            return None
        loss, info = clipped_surrogate(
            inputs.scores,
            inputs.micro,
            thoughts.advantages,
            inputs.config,
            thoughts.old_logps,
            weigh=inputs.objective.importance_weights,
        )
        return LossOutput(inputs.config.policy_coef * loss, {"policy_loss": float(loss.detach()), **info})


class Direct(Loss):
    """−log p(target | context, thought), with the objective's weights: reader term, VeriFree, JEPO."""

    def __call__(self, inputs: LossInputs) -> LossOutput | None:
        if inputs.thoughts is None:
            return None
        weights = inputs.objective.target_weights(inputs.micro.groups, inputs.scores)
        return LossOutput(target_loss(inputs.scores, weights))


class NextToken(Loss):
    """The next-token loss on the documents, with the objective's weights, times `loss.ntp_coef`.

    The factor is 1 for an objective without positions.
    """

    def count(self, micro: MicroBatch) -> float:
        """The micro-batch's predicted document tokens."""
        return float(len(micro.trunk_labels))

    def __call__(self, inputs: LossInputs) -> LossOutput:
        coefficient = inputs.config.ntp_coef if inputs.objective.has_positions else 1.0
        loss = inputs.objective.trunk_loss(inputs.micro, inputs.scores).sum()
        return LossOutput(coefficient * loss)


class Router(Loss):
    """How unevenly the experts of a mixture are used in each micro-batch, times `loss.router_coef`."""

    def count(self, micro: MicroBatch) -> float:
        """The micro-batch's tokens, by which its part of the step is weighted."""
        return float(micro.attention_mask.sum())

    def __call__(self, inputs: LossInputs) -> LossOutput | None:
        balance = inputs.scores.balance
        if balance is None:
            return None
        loss = inputs.config.router_coef * balance * self.count(inputs.micro)
        return LossOutput(loss, {"router/balance": float(balance.detach())})


TERMS: dict[str, type[Loss]] = {
    "next_token": NextToken,
    "surrogate": Surrogate,
    "direct": Direct,
    "router": Router,
}


def add_up(terms: Sequence[Loss], counts: Sequence[float], inputs: LossInputs) -> LossOutput:
    """The loss of a micro-batch: each term divided by its count over the whole step."""
    total, metrics = None, {}
    for term, count in zip(terms, counts, strict=True):
        output = term(inputs)
        if output is None:
            continue
        share = output.loss / max(count, 1)
        total = share if total is None else total + share
        for name, value in output.metrics.items():
            metrics[name] = value / max(count, 1) if name.endswith("loss") else value
    if total is None:  # every rank must call backward equally often
        total = 0.0 * inputs.scores.trunk_logps.sum()
    return LossOutput(total, metrics)


def make_losses(names: Sequence[str]) -> list[Loss]:
    """The terms of a run, by name.

    Raises ConfigError for a name that is neither in `TERMS` nor the path of a class that can be imported.
    """
    classes = [TERMS[name] if name in TERMS else find(name, "loss.terms", TERMS) for name in names]
    return [term() for term in classes]
