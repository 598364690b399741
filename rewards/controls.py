"""Control thoughts, which separate helpful content from extra tokens, and a monitor for collapse.

Everything here works on plain token ids and floats. If the content of thoughts is what helps, then emptied,
shuffled and foreign thoughts must not help: score the same target after each of them and compare the gains
(`information_gain`).
"""

import math
import random
from collections import deque
from collections.abc import Hashable, Iterable, Sequence
from typing import Any


def target_leakage(thought_ids: Sequence[int], target_ids: Sequence[int], n: int = 1) -> float:
    """Return the share of the target's n-grams that also occur in the thought, between 0 and 1.

    1 means that the thought contains the target. The thought may have worked out the answer, seen it, or
    listed every possible answer: compare with the length of the thought and with the gain of shuffled
    thoughts. `n` is lowered to the target's length if the target is shorter; 0 for an empty target.

    Raises:
        ValueError: n < 1.

    Source: METHODS pitfall 14, and RPT's remark on repeated targets (arXiv 2506.08007).

    >>> target_leakage([5, 6, 7, 8], [6, 7, 9], n=2)
    0.5
    """
    size = min(n, max(1, len(target_ids)))
    wanted, present = _ngrams(target_ids, size), set(_ngrams(thought_ids, size))
    return sum(gram in present for gram in wanted) / len(wanted) if wanted else 0.0


def empty(thought_ids: Sequence[int], keep_last: bool = True) -> list[int]:
    """Return the thought without its content: the close tag alone (`keep_last`), or nothing.

    Its gain is the value of the delimiters alone. A thought that was cut off has no close tag: pass False.

    >>> empty([4, 5, 6, 99])
    [99]
    """
    return list(thought_ids[-1:]) if keep_last else []


def filler(thought_ids: Sequence[int], filler_id: int, keep_last: bool = True) -> list[int]:
    """Return a thought of the same length with every token but the close tag (`keep_last`) as `filler_id`.

    Its gain is the value of extra positions to compute in, without any content.

    >>> filler([4, 5, 6, 99], 0)
    [0, 0, 0, 99]
    """
    size = len(thought_ids) - (1 if keep_last and thought_ids else 0)
    return [filler_id] * size + list(thought_ids[size:])


def shuffled(thought_ids: Sequence[int], seed: int, keep_last: bool = True) -> list[int]:
    """Return the thought's tokens in random order; with `keep_last` the last one, the close tag, stays last.

    The order differs from the original if any two tokens differ: otherwise it would not be a control.
    Deterministic under `seed`. The remaining gain comes from the words alone, not from reasoning.

    >>> sorted(shuffled([3, 1, 2, 99], seed=0)[:-1]), shuffled([3, 1, 2, 99], seed=0)[-1]
    ([1, 2, 3], 99)
    """
    size = len(thought_ids) - (1 if keep_last and thought_ids else 0)
    original, generator = list(thought_ids[:size]), random.Random(seed)
    content = list(original)
    while content == original and len(set(original)) > 1:
        generator.shuffle(content)
    return content + list(thought_ids[size:])


def other_document(document_ids: Sequence[Hashable], seed: int) -> list[int]:
    """Return for each thought the index of a thought from a different document, to score its target after.

    Each index is used once. If one document has more than half of all thoughts, those of the other documents
    are reused. Deterministic under `seed`. The gain of such a thought is the value of any well-formed
    thought.

    Raises:
        ValueError: fewer than two documents.

    >>> sorted(other_document(["a", "a", "b", "b"], seed=0)[:2])  # the first two get those of the last two
    [2, 3]
    """
    members: dict[Hashable, list[int]] = {}
    for index in random.Random(seed).sample(range(len(document_ids)), len(document_ids)):
        members.setdefault(document_ids[index], []).append(index)
    if len(members) < 2:
        raise ValueError(
            f"thoughts from another document need two documents, not {len(members)} "
            f"(with {len(document_ids)} thoughts): evaluate on more documents"
        )
    # The documents form a ring. A shift by the largest document's size leaves every document, and uses each
    # index once.
    ring = [index for indices in members.values() for index in indices]
    largest = max(len(indices) for indices in members.values())
    chosen = [0] * len(ring)
    for start, indices in zip(_starts(members.values()), members.values(), strict=True):
        others = len(ring) - len(indices)
        for offset, index in enumerate(indices):
            step = offset + largest - len(indices) if 2 * largest <= len(ring) else offset % others
            chosen[index] = ring[(start + len(indices) + step) % len(ring)]
    return chosen


def distinct_n(thoughts: Iterable[Sequence[int]], n: int = 2) -> float:
    """Return the number of distinct n-grams over the number of all n-grams: near 0 for identical thoughts.

    1.0 if there are no n-grams. Compare only sets of similar size and thought length: the number falls with
    both. Source: Li et al. 2016 (arXiv 1510.03055).

    >>> distinct_n([[1, 2, 3], [1, 2, 4]], n=2)
    0.75
    """
    grams = [gram for thought in thoughts for gram in _ngrams(thought, n)]
    return len(set(grams)) / len(grams) if grams else 1.0


def repetition(thought_ids: Sequence[int], n: int = 4) -> float:
    """Return the share of a thought's n-grams that repeat an earlier one: 0 for none, near 1 for a loop.

    0.0 for a thought of fewer than n tokens.

    >>> repetition([1, 2, 1, 2, 1], n=2)
    0.5
    """
    return 1.0 - distinct_n([thought_ids], n)


class CollapseMonitor:
    """Watches a run step by step and reports when it has collapsed.

    At small scale a collapse looks like this: the gain was positive, turns negative and stays negative, and
    the no-think loss rises by .2 to .5 nats. The cause is that one network both writes and reads the
    thoughts. The monitor compares means over the last `window` steps, so one bad batch does not end a run.
    It reports a collapse if

    - the mean gain is below 0, after a mean above 0 that was better by more than `margin` nats; or
    - the mean no-think loss is more than `no_think_rise` nats above `no_think_loss`, the value at the start
      of the run (None: the mean of the first full window).

    NaN and infinite values are ignored: a step with a non-finite loss is skipped, and `stop.nonfinite` counts
    those steps.

    The first rule does not apply before the gain has been positive. Measure the gain against the frozen
    initial model: against the current model, a worse no-think loss makes it look better. All numbers are
    plain floats; losses and gains are in nats. All state is in `state_dict`, so a resumed run stops at the
    same step.

    >>> monitor = CollapseMonitor(window=2, margin=0.1, no_think_loss=1.0)
    >>> rows = [dict(gain=g, no_think_loss=1.0, grad_norm=1.0, thought_length=9) for g in (1, 1, -2, -2)]
    >>> [monitor.observe(**row) for row in rows][-1].partition(";")[0]
    'information gain fell to -2.000 nats (mean of 2 steps) after a best of 1.000'
    """

    def __init__(
        self,
        *,
        window: int = 20,
        margin: float = 0.2,
        no_think_rise: float = 0.2,
        no_think_loss: float | None = None,
    ) -> None:
        if window < 1 or margin < 0 or not no_think_rise > 0:
            raise ValueError(
                f"window {window} must be at least 1, margin {margin} must not be negative, no_think_rise "
                f"{no_think_rise} must be above 0"
            )
        self.window, self.margin, self.no_think_rise = window, margin, no_think_rise
        self.reference = no_think_loss
        self.best_gain = -math.inf
        self._gains: deque[float] = deque(maxlen=window)
        self._losses: deque[float] = deque(maxlen=window)

    def observe(
        self, *, gain: float, no_think_loss: float, grad_norm: float, thought_length: float
    ) -> str | None:
        """Record one step; return the reason why the run should stop, or None."""
        mean_gain = self._add(self._gains, gain)
        mean_loss = self._add(self._losses, no_think_loss)
        if mean_gain is not None:
            self.best_gain = max(self.best_gain, mean_gain)
        if self.reference is None:
            self.reference = mean_loss
        details = f"; gradient norm {grad_norm:.3g}, thought length {thought_length:.3g}"
        if mean_gain is not None and mean_gain < 0 < self.best_gain:
            fall = self.best_gain - mean_gain
            if fall > self.margin:
                return (
                    f"information gain fell to {mean_gain:.3f} nats (mean of {self.window} steps) after a "
                    f"best of {self.best_gain:.3f}{details}"
                )
        if mean_loss is not None and self.reference is not None:
            rise = mean_loss - self.reference
            if rise > self.no_think_rise:
                return (
                    f"no-think loss rose to {mean_loss:.3f} nats (mean of {self.window} steps) from "
                    f"{self.reference:.3f}{details}"
                )
        return None

    def _add(self, values: deque[float], value: float) -> float | None:
        """Add a finite value and return the mean of a full window; None if there is no new mean."""
        if not math.isfinite(value):
            return None
        values.append(value)
        return sum(values) / self.window if len(values) == self.window else None

    def state_dict(self) -> dict[str, Any]:
        """Return the state as numbers and lists that JSON can hold (None for no best gain yet)."""
        best = self.best_gain if math.isfinite(self.best_gain) else None
        return {
            "gains": list(self._gains),
            "losses": list(self._losses),
            "best_gain": best,
            "reference": self.reference,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state from `state_dict()`; window, margin and rise keep this monitor's values."""
        self._gains = deque(state["gains"], maxlen=self.window)
        self._losses = deque(state["losses"], maxlen=self.window)
        self.best_gain = -math.inf if state["best_gain"] is None else state["best_gain"]
        self.reference = state["reference"]


def _ngrams(ids: Sequence[int], n: int) -> list[tuple[int, ...]]:
    """Return all n-grams in order, repeats included."""
    if n < 1:
        raise ValueError(f"n {n} must be at least 1")
    return [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]


def _starts(groups: Iterable[Sequence[int]]) -> list[int]:
    """Return the index at which each group starts in their concatenation."""
    starts, total = [], 0
    for group in groups:
        starts.append(total)
        total += len(group)
    return starts
