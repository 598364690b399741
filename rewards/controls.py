"""Controls that tell a thought that helps from one that merely occupies the place, and a monitor for
collapse.

Everything here works on plain token ids and floats. If thinking is what helps, then emptied, shuffled and
foreign thoughts must not: score the same target behind each of them and compare the gains
(`information_gain`).
"""

import math
import random
from collections import deque
from collections.abc import Hashable, Iterable, Sequence
from typing import Any


def target_leakage(thought_ids: Sequence[int], target_ids: Sequence[int], n: int = 1) -> float:
    """Return the share of the target's n-grams that also occur in the thought, between 0 and 1.

    1 means that the target stands in the thought. That is what a thought that works the answer out looks
    like, but also one that was shown the answer, or that lists every answer: read it together with the length
    of the thought and with the gain of shuffled thoughts. `n` is lowered to the target's length where that is
    less; 0 for an empty target.

    Raises:
        ValueError: n < 1. Source: METHODS pitfall 14, and RPT's remark on repeated targets (arXiv
        2506.08007).

    >>> target_leakage([5, 6, 7, 8], [6, 7, 9], n=2)
    0.5
    """
    size = min(n, max(1, len(target_ids)))
    wanted, present = _ngrams(target_ids, size), set(_ngrams(thought_ids, size))
    return sum(gram in present for gram in wanted) / len(wanted) if wanted else 0.0


def empty(thought_ids: Sequence[int], keep_last: bool = True) -> list[int]:
    """Return the thought without its content: the close tag alone (`keep_last`), or nothing.

    Its gain is what the delimiters by themselves are worth. A thought that was cut off has no close tag: pass
    False.

    >>> empty([4, 5, 6, 99])
    [99]
    """
    return list(thought_ids[-1:]) if keep_last else []


def filler(thought_ids: Sequence[int], filler_id: int, keep_last: bool = True) -> list[int]:
    """Return a thought of the same length in which every token is `filler_id`, but for the close tag
    (`keep_last`).

    Its gain is what extra positions to compute in are worth, without any content.

    >>> filler([4, 5, 6, 99], 0)
    [0, 0, 0, 99]
    """
    kept = len(thought_ids) - (1 if keep_last and thought_ids else 0)
    return [filler_id] * kept + list(thought_ids[kept:])


def shuffled(thought_ids: Sequence[int], seed: int, keep_last: bool = True) -> list[int]:
    """Return the thought's tokens in random order, the last (the close tag) staying last unless `keep_last`
    is False.

    The order differs from the original wherever two tokens differ, otherwise the control would not be one.
    Deterministic under `seed`. What gain remains comes from the words alone, not from working anything out.

    >>> sorted(shuffled([3, 1, 2, 99], seed=0)[:-1]), shuffled([3, 1, 2, 99], seed=0)[-1]
    ([1, 2, 3], 99)
    """
    kept = len(thought_ids) - (1 if keep_last and thought_ids else 0)
    original, generator = list(thought_ids[:kept]), random.Random(seed)
    body = list(original)
    while body == original and len(set(original)) > 1:
        generator.shuffle(body)
    return body + list(thought_ids[kept:])


def other_document(document_ids: Sequence[Hashable], seed: int) -> list[int]:
    """Return for each thought the index of a thought from a different document, to score its target behind.

    Each index is used once, unless one document holds more than half of all thoughts: then the others' are
    reused. Deterministic under `seed`. The gain of such a thought is what any well-formed thought is worth.

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
    # Documents one after the other in a ring; stepping by the largest document's size leaves any document
    # exactly once.
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
    """Return different n-grams over all n-grams of some thoughts: near 0 when they all say the same.

    1.0 where there is no n-gram at all. Compare only sets of similar size and length: the number falls with
    both. Source: Li et al. 2016 (arXiv 1510.03055).

    >>> distinct_n([[1, 2, 3], [1, 2, 4]], n=2)
    0.75
    """
    grams = [gram for thought in thoughts for gram in _ngrams(thought, n)]
    return len(set(grams)) / len(grams) if grams else 1.0


def repetition(thought_ids: Sequence[int], n: int = 4) -> float:
    """Return the share of a thought's n-grams that are repeats of an earlier one: 0 for none, near 1 for a
    loop.

    0.0 for a thought of fewer than n tokens.

    >>> repetition([1, 2, 1, 2, 1], n=2)
    0.5
    """
    return 1.0 - distinct_n([thought_ids], n)


class CollapseMonitor:
    """Watches a run step by step and says in words when it has collapsed.

    The collapse of this method looks like this at small scale: the gain, after it had been positive, turns
    negative and stays so, and the no-think loss climbs (by .2 to .5 nats), because one network writes the
    thoughts and reads them. Averages over the last `window` steps are compared, so one bad batch does not end
    a run:

    - the mean gain is below 0, after a mean that was above 0 and better by more than `margin` nats;
    - the mean no-think loss is more than `no_think_rise` nats above `no_think_loss`, the value at the start
      of the run (None: the mean of the first full window);

    A value that is NaN or infinite is no measurement: it enters no mean, sets no best and ends no run (a step
    with a loss that is not finite is skipped, and `stop.nonfinite` counts those).

    A run whose gain never was positive does not fire on the first rule: it has not begun. Measure the gain
    against the frozen initial model; against the current one it flatters itself. All numbers are plain
    floats, nats where they are losses or gains; all state is in `state_dict`, so that a resumed run fires at
    the same step.

    >>> monitor = CollapseMonitor(window=2, margin=0.1, no_think_loss=1.0)
    >>> rows = [dict(gain=g, no_think_loss=1.0, grad_norm=1.0, thought_length=9) for g in (1, 1, -2, -2)]
    >>> [monitor.observe(**row) for row in rows][-1]
    'information gain fell to -2.000 nats (mean of 2 steps) after a best of 1.000; gradient norm 1, thought
    length 9'
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
                f"window {window} must be at least 1, margin {margin} not negative, no_think_rise "
                f"{no_think_rise} above 0"
            )
        self.window, self.margin, self.no_think_rise = window, margin, no_think_rise
        self.reference = no_think_loss
        self.best_gain = -math.inf
        self._gains: deque[float] = deque(maxlen=window)
        self._losses: deque[float] = deque(maxlen=window)

    def observe(
        self, *, gain: float, no_think_loss: float, grad_norm: float, thought_length: float
    ) -> str | None:
        """Take in one step; return why the run should stop, or None."""
        mean_gain, mean_loss = self._mean(self._gains, gain), self._mean(self._losses, no_think_loss)
        if mean_gain is not None:
            self.best_gain = max(self.best_gain, mean_gain)
        if self.reference is None:
            self.reference = mean_loss
        ending = f"; gradient norm {grad_norm:.3g}, thought length {thought_length:.3g}"
        if (
            mean_gain is not None
            and mean_gain < 0 < self.best_gain
            and self.best_gain - mean_gain > self.margin
        ):
            return (
                f"information gain fell to {mean_gain:.3f} nats (mean of {self.window} steps) after a best "
                f"of {self.best_gain:.3f}{ending}"
            )
        if (
            mean_loss is not None
            and self.reference is not None
            and mean_loss - self.reference > self.no_think_rise
        ):
            return (
                f"no-think loss rose to {mean_loss:.3f} nats (mean of {self.window} steps) from "
                f"{self.reference:.3f}{ending}"
            )
        return None

    def _mean(self, seen: deque[float], value: float) -> float | None:
        """Mean of the last `window` values that are finite, this one included; None where it adds none, or
        they are too few.
        """
        if not math.isfinite(value):
            return None
        seen.append(value)
        return sum(seen) / self.window if len(seen) == self.window else None

    def state_dict(self) -> dict[str, Any]:
        """Return what was seen so far, as numbers and lists that JSON can hold (no best gain yet: None)."""
        best = self.best_gain if math.isfinite(self.best_gain) else None
        return {
            "gains": list(self._gains),
            "losses": list(self._losses),
            "best_gain": best,
            "reference": self.reference,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`; settings (window, margin, rise) stay this monitor's own."""
        self._gains = deque(state["gains"], maxlen=self.window)
        self._losses = deque(state["losses"], maxlen=self.window)
        self.best_gain = -math.inf if state["best_gain"] is None else state["best_gain"]
        self.reference = state["reference"]


def _ngrams(ids: Sequence[int], n: int) -> list[tuple[int, ...]]:
    if n < 1:
        raise ValueError(f"n {n} must be at least 1")
    return [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]


def _starts(groups: Iterable[Sequence[int]]) -> list[int]:
    """Where each group begins when they are laid one after the other."""
    starts, total = [], 0
    for group in groups:
        starts.append(total)
        total += len(group)
    return starts
