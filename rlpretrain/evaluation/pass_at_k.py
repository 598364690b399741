"""The estimate of pass@k from more than k answers."""

from __future__ import annotations

import numpy as np


def pass_at_k(correct: np.ndarray, k: int) -> np.ndarray:
    """[P] the probability that one of k answers is right, estimated from n >= k answers `correct` [P, n].

    With c right answers it is 1 - C(n-c, k) / C(n, k): the share of all sets of k answers that hold a right
    one, which has no bias (Chen et al. 2021, arXiv 2107.03374, eq. 1). The ratio is a product of k factors
    between 0 and 1, so that nothing overflows. Raises ValueError unless 1 <= k <= n.

    >>> pass_at_k(np.array([[True, False, False], [False, False, False]]), 2).round(3).tolist()
    [0.667, 0.0]
    """
    correct = np.asarray(correct, bool)
    n = correct.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs at least {max(k, 1)} answers for each position, there are {n}")
    wrong = n - correct.sum(1)
    drawn = np.arange(k)
    still_wrong = np.maximum(wrong[:, None] - drawn, 0) / (n - drawn)
    return 1.0 - still_wrong.prod(1)
