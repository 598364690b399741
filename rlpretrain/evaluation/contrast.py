"""Thoughts that should not help: the controls of an evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rewards.controls import other_document, shuffled
from rlpretrain.rollouts.drawing import document_number
from rollout.types import FinishReason, Group, Thought

CONTROLS = ("empty", "shuffled", "other")


def contrast(groups: Sequence[Group], kind: str, seed: int = 0) -> list[Group]:
    """The same groups with thoughts that should not help, and without rewards.

    `kind` is empty (the close tag alone), shuffled (the same tokens in random order) or other (the thoughts
    of another document).
    """
    if kind == "empty":
        return [_with_thoughts(group, (_empty_thought(group),)) for group in groups]
    if kind == "shuffled":
        return [_with_thoughts(group, _shuffled_thoughts(group, seed)) for group in groups]
    partners = other_document([group.position.document_id for group in groups], seed)
    return with_thoughts_of(groups, [groups[partner] for partner in partners])


def with_thoughts_of(groups: Sequence[Group], others: Sequence[Group]) -> list[Group]:
    """The same groups with the thoughts of others, and without rewards."""
    return [_with_thoughts(group, tuple(other.thoughts)) for group, other in zip(groups, others, strict=True)]


def _with_thoughts(group: Group, thoughts: tuple[Thought, ...]) -> Group:
    return replace(group, thoughts=thoughts, rewards=None)


def _empty_thought(group: Group) -> Thought:
    close_ids = group.prompt.close_ids
    return Thought(close_ids, (0.0,) * len(close_ids), FinishReason.CLOSE, group.policy_version, 0)


def _shuffled_thoughts(group: Group, seed: int) -> tuple[Thought, ...]:
    """Depends on the document and the seed only. A sampled close tag stays last."""
    group_seed = seed * 1_000_003 + document_number(group.position.document_id)
    thoughts = []
    for k, thought in enumerate(group.thoughts):
        is_closed = thought.finish_reason is FinishReason.CLOSE
        token_ids = shuffled(thought.token_ids, seed=group_seed * 1_009 + k, keep_last=is_closed)
        thoughts.append(replace(thought, token_ids=tuple(token_ids)))
    return tuple(thoughts)
