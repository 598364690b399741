"""The loop: take a batch, score it, reward the thoughts, update the policy."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import TYPE_CHECKING

from rlpretrain.training.advantages import (
    Advantages,
    compute_advantages,
    compute_step_advantages,
    leave_out_unrewarded,
)
from rlpretrain.training.losses import LossInputs, add_up
from rlpretrain.training.problems import Problem
from rlpretrain.types import MicroBatch

if TYPE_CHECKING:
    from rlpretrain.training.run import Run


def train(run: Run) -> None:
    """Train until the run stops."""
    for step in run.remaining_steps():
        batch = run.next_batch()  # thoughts sampled under the present weights
        micros = run.pack(batch, run.count(batch))  # as many on every rank
        known, metrics = None, deepcopy(run.metrics)
        if run.needs_step_advantages():
            micros, known = score_first(run, micros)
        for _ in range(run.config.loss.inner_epochs):
            if not add_gradients(run, micros, known):  # a counted thought has no reward: leave it out
                run.policy.discard()
                run.metrics = metrics
                micros, known = score_first(run, micros)
                add_gradients(run, micros, known)
            run.update()  # optimizer step, then the baseline's
        run.sync(version=step + 1)
        run.finish(step + 1, batch)  # log, evaluate, checkpoint, decide whether to continue


def score_first(run: Run, micros: Sequence[MicroBatch]) -> tuple[list[MicroBatch], list[Advantages]]:
    """Score a whole step before it is trained.

    Returns its micro-batches without the thoughts that have no reward, and all advantages.
    """
    known = compute_step_advantages(run, micros)
    return leave_out_unrewarded(run, micros, [k.rewards for k in known]), known


def add_gradients(run: Run, micros: Sequence[MicroBatch], known: Sequence[Advantages] | None) -> bool:
    """Add up the step's gradient. False where a counted thought has no reward: discard the gradient."""
    counts = run.count_losses(micros)  # global denominators, one all-reduce
    for i, micro in enumerate(micros):
        micro = micro.to(run.ranks.device)
        own = run.policy.score(micro)  # one forward: thoughts, targets, trunk
        scores = run.add_references(own, micro)
        thoughts = None
        if micro.groups:
            thoughts = known[i] if known else compute_advantages(run.objective, micro, scores)
        inputs = LossInputs(scores, micro, thoughts, run.objective, run.config.loss)
        output = add_up(run.losses, counts, inputs)
        problem = run.find_problem(inputs, output, live=known is None)
        if problem is Problem.NO_REWARD:
            return False
        if problem is Problem.NOT_FINITE:
            break
        run.policy.backward(output.loss)
        run.observe(inputs, output, own.baseline_logps)
    return True
