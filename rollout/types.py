"""The data that objectives, engines and the trainer exchange: token ids, and plain data about them.

Everything here is frozen and made of tuples and numbers, so that a group on disk, on a queue or in another
process equals the one in memory. Token ids are kept instead of text, so nothing is retokenised.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from torch import Tensor

WeightSource = Callable[[], Iterable[tuple[str, Tensor]]]
"""Called once per sync; gives (parameter name, full tensor) pairs, tied weights under all their names."""


class FinishReason(StrEnum):
    """Why sampling of a thought ended."""

    CLOSE = "close"  # a stop id or stop string of the prompt: the thought closed itself
    EOS = "eos"  # an end-of-text id: the model ended the document instead of closing the thought
    LENGTH = "length"  # cut off at max_thought_tokens
    ABORT = "abort"  # the engine gave up (shutdown, fault); such a thought is never trained


@dataclass(frozen=True, slots=True)
class Document:
    """A tokenised text, as it is trained on, stored, replayed and resumed.

    `source` says where it came from (file and line, or dataset and row), `stream` is the name of its source
    in a mixture. `meta` keeps other columns of its row. `answer_at` is the index of the answer's first token,
    if the text is a prompt with an answer. `scores` has a number for each token, where an objective's
    `prepare` or a document source sets them.
    """

    id: str
    token_ids: tuple[int, ...]
    source: str = ""
    meta: dict[str, Any] | None = None
    answer_at: int | None = None
    scores: tuple[float, ...] | None = None
    stream: str = ""


@dataclass(frozen=True, slots=True)
class Position:
    """A place in a document where the model may think before it predicts.

    `target_ids` are the document's ids from `index` on, `context_ids` those before it. `suffix_ids` are ids
    after the target, for a method that may read them (a masked segment), or another text in the target's
    place (a rewrite).
    """

    document_id: str
    index: int
    context_ids: tuple[int, ...]
    target_ids: tuple[int, ...]
    suffix_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Prompt:
    """The ids around a thought: `token_ids` + sampled thought + `join_ids` + target.

    A thought ends by itself with one of `stop_ids` (the sampled close tag stays in the thought and is
    trained) or when its decoded text contains one of `stop_strings`. If the cut-off policy asks for it,
    `close_ids` are injected after a thought that did not close itself; they are never trained.
    """

    token_ids: tuple[int, ...]
    stop_ids: tuple[int, ...]
    close_ids: tuple[int, ...] = ()
    join_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()


def sane_temperature(value: float) -> float:
    """The temperature, if it is 0 (greedy) or finite and at least .01; ValueError for any other.

    Logits divided by less can leave float32's range, and vLLM would silently use .01 instead.
    """
    if value == 0 or 0.01 <= value < math.inf:
        return value
    raise ValueError(f"temperature must be 0 (greedy) or finite and at least 0.01, got temperature={value}")


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How thoughts are drawn: `top_k` 0 and `top_p` 1 do not truncate, `temperature` 0 is greedy.

    `banned_ids` are never sampled: they are removed before everything else, greedy choices included.
    """

    max_thought_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    eos_ids: tuple[int, ...] = ()
    banned_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.max_thought_tokens < 1:
            raise ValueError(f"max_thought_tokens must be at least 1, got {self.max_thought_tokens}")
        sane_temperature(self.temperature)
        if not 0 < self.top_p <= 1 or self.top_k < 0:
            raise ValueError(
                f"need 0 < top_p <= 1 and top_k >= 0; got top_p={self.top_p}, top_k={self.top_k}"
            )


@dataclass(frozen=True, slots=True)
class Thought:
    """One sampled thought.

    `token_ids` are exactly the sampled ids, the close tag or end-of-text included. `behaviour_logps` (nats,
    one per id) are the log-probabilities of the distribution they were drawn from: without banned ids, after
    temperature, top-p and top-k.

    `updates` has (index, version) where other weights arrived while it was sampled: the ids from `index` on
    were drawn with those of `version`, the ids before the first one with those of `policy_version`.

    A `given` thought was not sampled: its ids come from the data (a candidate beside the sampled ones). It is
    never cut off, its importance weight is 1 whatever `behaviour_logps` holds, and no statistic of what was
    sampled includes it.
    """

    token_ids: tuple[int, ...]
    behaviour_logps: tuple[float, ...]
    finish_reason: FinishReason
    policy_version: int
    seed: int
    answer_span: tuple[int, int] | None = None
    given: bool = False
    updates: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Group:
    """G thoughts for one prompt: the unit of queueing, storage, staleness and dropping.

    `position` is what is predicted. `rewards` has one number per thought where a reward needs no live
    log-probabilities. `role` tells groups of one objective apart, and `parent_id` names the group from which
    this one was made.
    """

    id: str
    position: Position
    prompt: Prompt
    thoughts: tuple[Thought, ...]
    policy_version: int
    parent_id: str | None = None
    role: str = "policy"
    rewards: tuple[float, ...] | None = None
    extra: dict[str, Any] = field(default_factory=dict)
