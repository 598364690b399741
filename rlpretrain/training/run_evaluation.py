"""Evaluation inside a run: the model with the policy's present weights, on the held-out documents of all
ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from rlpretrain import models
from rlpretrain.evaluation.evaluate import Evaluation, evaluate
from rlpretrain.models import adapters
from rlpretrain.scoring.scorer import NoGradScorer
from rlpretrain.training.builder import Parts
from rollout.weights import copy_weights


@dataclass(eq=False)
class RunEvaluation:
    """Evaluates the policy of a run."""

    parts: Parts
    whole: nn.Module | None = None
    """A model of its own, for policies whose weights are spread over the ranks."""

    def evaluate(self) -> dict[str, float]:
        """The metrics of the present weights, the same on every rank. All ranks call it."""
        config, ranks = self.parts.config, self.parts.ranks
        mine = self.parts.held_out[ranks.rank :: ranks.size]
        model, frozen = self.model(), self.parts.frozen and self.parts.frozen.model
        if self.parts.frozen and config.policy.lora:
            frozen = NoGradScorer(model, adapters_off=True)
        here = evaluate(
            model,
            self.parts.objective,
            mine,
            frozen=frozen,
            thoughts=config.eval.thoughts,
            seed=config.seed,
            token_budget=config.token_budget,
            pad_id=self.parts.layout.pad_id,
        )
        joined = Evaluation.join(ranks.gather(here))
        return {f"eval/{k}": v for k, v in joined.summary().items() if not k.endswith("_ci")}

    def model(self) -> nn.Module:
        """A whole model with the policy's present weights; with adapters, where those are trained."""
        config, policy = self.parts.config, self.parts.policy
        lora = config.policy.lora
        sampled = self.parts.engine.info.module
        if sampled is not None and not lora:
            return sampled
        if policy.shares_weights:
            return policy.model
        if self.whole is None:
            self.whole = models.load_with_tokenizer(config.model, self.parts.delimiters, config.seed)[0].to(
                self.parts.ranks.device
            )
            if lora:
                adapters.add_lora(self.whole, lora, adapters.new_tokens(policy.model))
        if lora:
            adapters.copy_adapter(self.whole, dict(policy.adapter()))
        else:
            copy_weights(self.whole, policy.weights)
        return self.whole


def score_of(row: dict[str, float]) -> float:
    """The number by which evaluations are compared; more is better."""
    return row.get("eval/gain_frozen", row.get("eval/reward", -row["eval/no_think_loss"]))
