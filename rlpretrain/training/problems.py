"""What can be wrong with a micro-batch, found on all ranks together."""

from __future__ import annotations

from enum import Enum


class Problem(Enum):
    """Why the gradient of a micro-batch is not taken."""

    NOT_FINITE = "log-probs or the loss are NaN or inf: the step is skipped"
    NO_REWARD = (
        "a thought that the denominators count has no reward after all: the step is scored first, then "
        "trained"
    )
