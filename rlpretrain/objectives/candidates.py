"""Candidates of SIP: given ones, best and worst by their scores, and numbers about what was chosen."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from rlpretrain.config import ConfigError, PretrainConfig
from rlpretrain.data.token_text import TokenReader
from rollout.types import FinishReason, Group, Thought


def given_thought(ids: Sequence[int], version: int) -> Thought:
    """A candidate whose ids come from the data."""
    return Thought(tuple(ids), (0.0,) * len(ids), FinishReason.CLOSE, version, 0, given=True)


def whole(thought: Thought) -> Thought:
    """A rollout that is complete, whatever ended it: it has no tag to close."""
    return replace(thought, finish_reason=FinishReason.CLOSE)


def ids_after(before: Sequence[int], text: str, tokenizer: Any, reader: TokenReader) -> list[int]:
    """The ids of a text where it follows `before`: those of both together, if they begin with `before`.

    Else, or where the two texts would join to a word that the tokenizer does not know, the text's own; or
    those that it has after a line break, if only these are read as the text there (a tokenizer may begin
    every text with a space).
    """
    encoded = [
        tokenizer(each, add_special_tokens=False, verbose=False)["input_ids"]
        for each in (text, reader.text(before) + text)
    ]
    own, together, known = *encoded, list(before)
    unknown = tokenizer.unk_token_id
    if len(together) <= len(known) or together[: len(known)] != known:
        line, both = (tokenizer(each, add_special_tokens=False)["input_ids"] for each in ("\n", "\n" + text))
        after = both[len(line) :] if line and both[: len(line)] == line else []
        is_text = [reader.text([*known, *ids]) == reader.text(before) + text for ids in (own, after)]
        return after if is_text == [False, True] else own
    return own if together.count(unknown) > (known + own).count(unknown) else together[len(known) :]


def check_rewrites(c: Any, run: PretrainConfig) -> None:
    """Check that rewrites can be found, and where they begin. Raises ConfigError. `c` is the Config."""
    if "rewrite" not in c.candidates:
        if c.rewrite_column is not None:
            raise ConfigError("objective.rewrite_column is set, but objective.candidates has no rewrite")
        return
    if c.rewrite_column is None:
        raise ConfigError("objective.candidates has rewrite: set objective.rewrite_column")
    if c.positions != "answer":
        raise ConfigError(
            "objective.positions must be answer: a rewrite replaces the answer (data.answer_column)"
        )
    for data in run.data.sources.values() or [run.data]:
        if getattr(data, "use", "think") == "think" and c.rewrite_column not in data.meta_columns:
            raise ConfigError(
                f"data.meta_columns lacks objective.rewrite_column '{c.rewrite_column}': add it there"
            )


def only(group: Group, places: Sequence[int]) -> Group:
    """The group with the candidates at these places alone."""
    rewards, kinds = group.rewards or (), group.extra["kinds"]
    return replace(
        group,
        thoughts=tuple(group.thoughts[place] for place in places),
        rewards=tuple(rewards[place] for place in places),
        extra=group.extra | {"kinds": [kinds[place] for place in places]},
    )


def best_and_worst(scores: Sequence[float]) -> tuple[int, int] | None:
    """Places of the highest and the lowest score, the first of equals; NaN is no score.

    The same place twice if there is one score. None if there is none, or all of several are equal.

    >>> best_and_worst([0.5, 1.0, 0.0]), best_and_worst([0.5, 0.5]), best_and_worst([0.5])
    ((1, 2), None, (0, 0))
    """
    known = [place for place, score in enumerate(scores) if not math.isnan(score)]
    if not known:
        return None
    best = max(known, key=lambda place: scores[place])
    worst = min(known, key=lambda place: scores[place])
    is_tie = len(known) > 1 and scores[best] == scores[worst]
    return None if is_tie else (best, worst)


def choose(group: Group, only_best: bool) -> tuple[int, ...] | None:
    """The places of the candidates in the loss, best and worst or the best; None without a preference.

    Where only the best is wanted, candidates that are all the same text are one, which is the best.
    """
    known = [place for place, score in enumerate(group.rewards or ()) if not math.isnan(score)]
    choice = best_and_worst(group.rewards or ())
    if only_best:
        is_one = len({group.thoughts[place].token_ids for place in known}) == 1
        return choice[:1] if choice else (known[0],) if is_one else None
    return choice if choice and choice[0] != choice[1] else None


@dataclass(slots=True)
class Selection:
    """Numbers about the candidates of a step and those that were chosen."""

    means: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    lengths: list[np.ndarray] = field(default_factory=list)
    scores: list[np.ndarray] = field(default_factory=list)

    def add(self, group: Group, choice: Sequence[int] | None) -> None:
        """Count a group with all of its candidates, and the places of those that enter the loss."""
        kinds = group.extra.get("kinds", [])
        known = [
            (len(thought.token_ids), score, kind)
            for thought, score, kind in zip(group.thoughts, group.rewards or (), kinds, strict=False)
            if not math.isnan(score)
        ]
        self._put("ties", float(choice is None))
        for _, score, kind in known:
            self._put("judge_mean", score)
            self._put(f"judge_{kind}", score)
        if known:
            lengths, scores = np.array([k[0] for k in known], float), np.array([k[1] for k in known])
            self.lengths.append(lengths - lengths.mean())
            self.scores.append(scores - scores.mean())
        for name, place in zip(("chosen", "rejected"), choice or (), strict=False):
            self._put(f"{name}_length", float(len(group.thoughts[place].token_ids)))
            for kind in dict.fromkeys(kinds):
                self._put(f"{name}_{kind}", float(kinds[place] == kind))

    def take(self) -> dict[str, float]:
        """The means since the last call, and the correlation of length and score within prefixes."""
        numbers = {f"objective/{name}": float(np.mean(values)) for name, values in self.means.items()}
        if self.lengths:
            lengths, scores = np.concatenate(self.lengths), np.concatenate(self.scores)
            norm = float(np.sqrt((lengths**2).sum() * (scores**2).sum()))
            if norm > 0:
                numbers["objective/judge_length_corr"] = float((lengths * scores).sum()) / norm
        self.means.clear()
        self.lengths, self.scores = [], []
        return numbers

    def _put(self, name: str, value: float) -> None:
        self.means[name].append(value)
