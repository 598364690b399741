"""Weights and scores that are not finite."""

from __future__ import annotations

import dataclasses
import math

import torch

from rlpretrain.training.run import Run


def poison(run: Run, where: str, at) -> None:
    """Let the steps in `at` (from 1) meet NaN or inf."""
    score, reward = run.policy.score, run.objective.reward
    weights_of, step = run.objective.target_weights, run.policy.step

    def hit() -> bool:
        return run.step + 1 in at

    if where == "log-probs":

        def bad_score(micro, *args, **kwargs):
            scores = score(micro, *args, **kwargs)
            return (
                dataclasses.replace(scores, thought_logps=scores.thought_logps * math.nan)
                if hit()
                else scores
            )

        run.policy.score = bad_score
    elif where == "baseline":
        baseline = run.baseline

        class Broken(type(baseline)):
            def __call__(self, scores, micro):
                inf = torch.full_like(scores.baseline_logps, -math.inf)
                return dataclasses.replace(scores, baseline_logps=inf) if hit() else scores

        run.baseline = Broken()
    elif where == "reward":
        run.objective.reward = lambda *a: reward(*a) + (math.inf if hit() else 0.0)
    elif where == "loss":
        run.objective.target_weights = lambda *a: weights_of(*a) * (math.nan if hit() else 1.0)
    else:

        def bad_step():
            if hit():
                next(run.policy.model.parameters()).grad[0, 0] = math.inf
            return step()

        run.policy.step = bad_step
