"""Evaluation during a run, with the policy's current weights, on the held-out documents of all ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from rlpretrain import models
from rlpretrain.evaluation.evaluate import Evaluation, evaluate, evaluate_losses
from rlpretrain.evaluation.places import only_read
from rlpretrain.models import adapters
from rlpretrain.scoring.scorer import NoGradScorer
from rlpretrain.training import run_stop
from rlpretrain.training.builder import Parts
from rlpretrain.types import Document
from rollout.weights import copy_weights

if TYPE_CHECKING:
    from rlpretrain.training.averaging import WeightAverage
    from rlpretrain.training.run import Run


Progress = Callable[[int, int], None] | None
"""Called with the numbers of evaluated and of all positions."""


@dataclass(eq=False)
class RunEvaluation:
    """Evaluates the policy of a run."""

    parts: Parts
    whole: nn.Module | None = None
    """A model of its own, for policies whose weights are spread over the ranks."""

    def evaluate(self, progress: Progress = None) -> dict[str, float]:
        """The metrics of the current weights, the same on every rank. All ranks call it."""
        return self._evaluate(self.model(), progress, "eval")

    def evaluate_average(self, average: WeightAverage, progress: Progress = None) -> dict[str, float]:
        """The metrics of the average of the weights. All ranks call it."""
        sampled = self.parts.engine.info.module
        with self.parts.source.paused():
            with average.in_place():
                row = self._evaluate(self._whole_model(), progress, "eval_averaged")
            if self.whole is not None and self.whole is sampled:
                copy_weights(self.whole, self.parts.policy.weights)  # the engine gets its weights back
        return row

    def _evaluate(self, model: nn.Module, progress: Progress, prefix: str) -> dict[str, float]:
        config, ranks = self.parts.config, self.parts.ranks
        assert self.parts.held_out is not None, "a run evaluates only with eval.data"
        documents, read_documents = self._own_documents()
        frozen = self.parts.frozen and self.parts.frozen.model
        if self.parts.frozen and config.policy.lora:
            frozen = NoGradScorer(model, adapters_off=True)
        local = evaluate(
            model,
            self.parts.objective,
            documents,
            frozen=frozen,
            thoughts=config.eval.thoughts,
            positions=config.eval.positions,
            seed=config.seed,
            token_budget=config.token_budget,
            pad_id=self.parts.layout.pad_id,
            tree=self.parts.layout.tree,
            progress=progress,
        )
        joined = Evaluation.join(ranks.gather(local))
        numbers = _numbers(joined, prefix)
        parts = joined.by_stream()
        if any(ranks.gather(bool(read_documents))):
            losses = None
            if read_documents:
                losses = evaluate_losses(
                    model,
                    self.parts.objective,
                    read_documents,
                    seed=config.seed,
                    token_budget=config.token_budget,
                    pad_id=self.parts.layout.pad_id,
                )
            known = [part for part in ranks.gather(losses) if part is not None]
            parts |= Evaluation.join(known).by_stream()
        for name, part in parts.items():
            numbers |= _numbers(part, f"{prefix}/{name}")
        return numbers

    def _own_documents(self) -> tuple[list[Document], list[Document]]:
        """This rank's held-out documents: those to think in, and those of sources that are only read."""
        parts = self.parts
        assert parts.held_out is not None, "a run evaluates only with eval.data"
        reads = [parts.objective.has_positions and only_read(parts.config, d.stream) for d in parts.held_out]
        thinking = [document for document, is_read in zip(parts.held_out, reads, strict=True) if not is_read]
        reading = [document for document, is_read in zip(parts.held_out, reads, strict=True) if is_read]
        return thinking[parts.ranks.rank :: parts.ranks.size], reading[parts.ranks.rank :: parts.ranks.size]

    def model(self) -> nn.Module:
        """A whole model with the policy's current weights; with adapters, if these are trained."""
        sampled = self.parts.engine.info.module
        if sampled is not None and not self.parts.config.policy.lora:
            return sampled
        return self._whole_model()

    def _whole_model(self) -> nn.Module:
        """The policy's model, or where that is sharded a whole one with its weights copied in."""
        config, policy = self.parts.config, self.parts.policy
        lora = config.policy.lora
        if policy.shares_weights:
            return policy.model
        if self.whole is None and not lora:
            self.whole = self.parts.engine.info.module  # spares a copy
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


def _numbers(evaluation: Evaluation, prefix: str) -> dict[str, float]:
    """The means of an evaluation as metrics."""
    means = {name: value for name, value in evaluation.summary().items() if isinstance(value, int | float)}
    return {f"{prefix}/{name}": value for name, value in means.items()}


def evaluate_run(run: Run) -> dict[str, float]:
    """Evaluate, and compare with the best evaluation so far; returns the row. All ranks call it."""
    row = run.evaluation.evaluate(run.console.evaluating)
    if run.average and run.average.count:
        row |= run.evaluation.evaluate_average(run.average, run.console.evaluating)
    score, not_finite = score_of(row), row.get("eval/not_finite", 0.0)
    if not_finite or not math.isfinite(score):  # neither a new best nor a lack of progress
        problem = (
            f"{not_finite:.0%} of the positions have log-probs of NaN or inf" if not_finite else "no number"
        )
        run.console.say(f"step {run.step}: the evaluation decides nothing ({problem})")
        return row
    best = run.best["gain"]
    if best is None or not best >= score:  # an older run may have kept NaN as its best
        run.best = {"step": run.step, "gain": score, "stale": 0}
        return row
    run.best["stale"] += 1
    run.stopped = run_stop.out_of_patience(run) or run.stopped
    return row


def score_of(row: dict[str, float]) -> float:
    """The number by which evaluations are compared; larger is better."""
    return row.get("eval/gain_frozen", row.get("eval/reward", -row["eval/no_think_loss"]))
