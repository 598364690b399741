"""Problems of a micro-batch, which all ranks find together."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

import torch

from rlpretrain.training import records
from rlpretrain.training.advantages import has_uncounted
from rlpretrain.training.losses import LossInputs, LossOutput

if TYPE_CHECKING:
    from rlpretrain.training.run import Run


class Problem(Enum):
    """The reason why the gradient of a micro-batch is not computed."""

    NOT_FINITE = "log-probs or the loss are NaN or inf: the step is skipped"
    NO_REWARD = "a counted thought has no reward: the step is scored first, then trained"


def find_problem(run: Run, inputs: LossInputs, output: LossOutput, live: bool) -> Problem | None:
    """The problem of a micro-batch on any rank, or None; one all-reduce.

    A batch that is not finite is stored in a file. `live`: the rewards come from the forward that trains, so
    a NaN among them was not known when the thoughts were counted.
    """
    scores, micro = inputs.scores, inputs.micro
    logps = (scores.thought_logps, scores.target_logps, scores.baseline_logps, scores.trunk_logps)
    bad_logps = not all(bool(torch.isfinite(tensor).all()) for tensor in logps)
    bad_loss = not bool(torch.isfinite(output.loss))
    unrewarded = live and has_uncounted(micro, inputs.thoughts)
    local_problems = [float(bad_logps), float(bad_loss), float(unrewarded)]
    any_bad_logps, any_bad_loss, any_unrewarded = run.ranks.max(local_problems)
    if any_bad_logps or any_bad_loss:
        run.bad = "log-probs" if any_bad_logps else "loss"
        if bad_logps or bad_loss:
            records.keep_batch(
                run.folder, run.step + 1, run.ranks.rank, run.bad, micro.groups, micro.documents
            )
    if run.bad is not None:
        return Problem.NOT_FINITE
    return Problem.NO_REWARD if any_unrewarded else None
