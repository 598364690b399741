"""Sampled thoughts as texts: what of them may stand in a document, and how they are written into it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from rewards.controls import target_leakage
from rlpretrain.corpora.text_places import Piece
from rlpretrain.data.token_text import REPLACEMENT, TokenReader
from rlpretrain.objectives import Objective
from rollout.types import FinishReason, Group, Position, Thought

REASONS = {
    "unfinished": "cut off, or ended by the end of text, before the close tag",
    "empty": "nothing between the tags",
    "special": "special tokens or tags inside",
    "garbled": "incomplete characters",
    "unreadable": "the tokenizer does not find the tags again in the text",
    "long": "longer than --longest",
    "leak": "repeats too much of the target",
    "gain": "gain not above --min-gain",
    "spare": "another thought of the place was taken",
}
"""Why a sampled thought is not in the text; a thought counts under the first reason that holds."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a thought must keep to be written into the text."""

    unfinished: bool = False
    """Keep thoughts that did not close themselves; they are closed for it."""
    longest: int | None = None
    """Most tokens between the tags."""
    max_leak: float = 1.0
    """Largest share of the target's n-grams that occur in the thought."""
    leak_n: int = 4
    """n of these n-grams."""
    min_gain: float | None = None
    """The gain must be above this number of nats; None: nothing is scored, and the first thought is taken."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A sampled thought at a place, without its tags."""

    thought: Thought
    ids: tuple[int, ...]
    """Between the tags."""
    text: str
    written: str
    """With its tags, as it is written into the text."""
    leak: float | None
    problem: str | None
    """One of `REASONS`."""
    logp_with: float | None = None
    """Log p (nats) of the target after the thought, under the scorer."""
    logp_without: float | None = None
    gain: float | None = None
    """The reward of the objective: for `rlp` their difference."""

    def record(self) -> dict[str, Any]:
        """What a row says of a thought that it contains."""
        row = {
            "text": self.text,
            "tokens": len(self.ids),
            "seed": self.thought.seed,
            "finish_reason": str(self.thought.finish_reason),
        }
        numbers = ("logp_without", "logp_with", "gain", "leak")
        return row | {name: value for name in numbers if (value := getattr(self, name)) is not None}


class ThoughtReader:
    """Turns sampled thoughts into candidates, and checks that their tokens may stand in a document."""

    def __init__(self, objective: Objective, limits: Limits):
        self.limits, self.tokenizer = limits, objective.tokenizer
        self.reader = TokenReader(self.tokenizer)
        self.open, self.close = objective.template.open_id, objective.template.close_id
        added = getattr(self.tokenizer, "added_tokens_decoder", None) or {}
        special = {token_id for token_id, token in added.items() if token.special}
        self.special = special | set(self.tokenizer.all_special_ids) | {self.open, self.close}

    def __call__(self, thought: Thought, piece: Piece, position: Position, cut: int) -> Candidate:
        """The candidate of a sampled thought, with the first problem that needs no score."""
        if thought.finish_reason is FinishReason.ABORT:
            raise EngineGaveUp(
                f"the engine gave up on a thought for {piece.document.source}; its servers or actors may be "
                "down. Rows that are done are kept: the same command goes on there"
            )
        ids = thought.token_ids
        is_finished = thought.finish_reason is FinishReason.CLOSE
        if is_finished or thought.finish_reason is FinishReason.EOS:
            ids = ids[:-1]
        context = position.context_ids
        text = self.reader.text(ids, after=(*context, self.open))
        written = self.reader.text((self.open, *ids, self.close), after=context)
        leak = None
        if position.target_ids:
            leak = target_leakage(ids, position.target_ids, self.limits.leak_n)
        candidate = Candidate(thought, ids, text, written, leak, None)
        problem = None if is_finished or self.limits.unfinished else "unfinished"
        problem = problem or self._problem(candidate, piece, cut)
        return replace(candidate, problem=problem)

    def _problem(self, candidate: Candidate, piece: Piece, cut: int) -> str | None:
        """Why the thought cannot stand in the text, or breaks a limit that needs no score."""
        limits = self.limits
        if not candidate.text.strip():
            return "empty"
        if self.special & set(candidate.ids):
            return "special"
        if REPLACEMENT in candidate.text:
            return "garbled"
        if not self._is_read_back(candidate.written, piece, cut):
            return "unreadable"
        if limits.longest is not None and len(candidate.ids) > limits.longest:
            return "long"
        return "leak" if candidate.leak is not None and candidate.leak > limits.max_leak else None

    def _is_read_back(self, written: str, piece: Piece, cut: int) -> bool:
        """Whether the text with the thought has one more of each tag, and as many other special tokens."""
        text = piece.text[piece.first : max(cut, piece.last)]
        at = cut - piece.first
        before, after = self._count(text), self._count(text[:at] + written + text[at:])
        return after == before + Counter((self.open, self.close))

    def _count(self, text: str) -> Counter[int]:
        """How often each special token and tag is in a text."""
        ids = self.tokenizer(text, verbose=False)["input_ids"]
        return Counter(token_id for token_id in ids if token_id in self.special)


class EngineGaveUp(RuntimeError):
    """An engine aborted thoughts, which are not written as if they had been sampled."""

    says_all = True  # the message is enough: print no traceback


def closed_group(group: Group, candidates: Sequence[Candidate], close_id: int) -> Group:
    """The group with its candidates as they would stand in the text, closed, for scoring."""
    thoughts = []
    for candidate in candidates:
        ids = (*candidate.ids, close_id)
        thoughts.append(
            replace(
                candidate.thought,
                token_ids=ids,
                behaviour_logps=(0.0,) * len(ids),
                finish_reason=FinishReason.CLOSE,
            )
        )
    return replace(group, thoughts=tuple(thoughts), rewards=None)


def choose(candidates: Sequence[Candidate], limits: Limits) -> tuple[Candidate | None, Counter[str]]:
    """The thought that is written into the text, and why the others are not.

    With a `min_gain` it is the one with the highest gain, else the first without a problem.
    """
    dropped = Counter(candidate.problem for candidate in candidates if candidate.problem)
    usable = [candidate for candidate in candidates if candidate.problem is None]
    if limits.min_gain is not None:
        enough = [c for c in usable if c.gain is not None and c.gain > limits.min_gain]
        dropped["gain"] += len(usable) - len(enough)
        usable = sorted(enough, key=lambda c: -(c.gain or 0.0))
    if usable:
        dropped["spare"] += len(usable) - 1
    return (usable[0] if usable else None), Counter({k: v for k, v in dropped.items() if v})
