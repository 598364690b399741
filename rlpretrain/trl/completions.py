"""TRL's completions as groups of thoughts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from rlpretrain.objectives import Objective
from rlpretrain.trl.data import PROMPT_COLUMNS
from rlpretrain.trl.prompts import position_of
from rollout.types import FinishReason, Group, Thought


def group_completions(
    objective: Objective, completion_ids: Sequence[Sequence[int]], columns: Mapping[str, Sequence[Any]]
) -> list[Group]:
    """The completions as groups: neighbours at one position belong together. `columns` has a row for each."""
    present = [name for name in PROMPT_COLUMNS if name != "prompt" and columns.get(name)]
    values = zip(*(columns[name] for name in present), strict=True)
    rows = [dict(zip(present, row, strict=True)) for row in values]
    pairs = zip(rows, completion_ids, strict=True)
    groups: list[Group] = []
    for _, neighbours in groupby(pairs, key=lambda pair: (pair[0]["document_id"], pair[0]["position"])):
        same = list(neighbours)
        position = position_of(same[0][0])
        thoughts = tuple(make_thought(objective, ids) for _, ids in same)
        id_ = f"{position.document_id}@{position.index}:{len(groups)}"
        groups.append(Group(id_, position, objective.prompt(position), thoughts, 0))
    return groups


def make_thought(objective: Objective, completion_ids: Sequence[int]) -> Thought:
    """A completion as a thought without behaviour log-probs and without padding.

    It ends with its close tag, and what follows the tag is dropped unless the objective reads an answer
    there.
    """
    ids = [int(i) for i in completion_ids]
    close, eos = objective.template.close_id, objective.tokenizer.eos_token_id
    if close in ids:
        size = ids.index(close) + 1
        kept = ids if objective.answer_tokens else ids[:size]
        reason, answer_span = FinishReason.CLOSE, (size, len(kept)) if objective.answer_tokens else None
    elif eos in ids:
        kept, reason, answer_span = ids[: ids.index(eos) + 1], FinishReason.EOS, None
    else:
        kept, reason, answer_span = ids, FinishReason.LENGTH, None
    return Thought(tuple(kept), (0.0,) * len(kept), reason, 0, 0, answer_span)
