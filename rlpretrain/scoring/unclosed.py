"""How each sampled thought is used: whether it counts, which tokens close it, and its penalty.

`sampling.cut` names the rule for thoughts that did not close themselves. All others count as they are, and so
do given ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from rollout.types import FinishReason, Group, Prompt


@dataclass(frozen=True, slots=True)
class ThoughtUse:
    """How one thought is used in a step."""

    counted: bool = True
    """False: the thought is left out of the input, the loss and all denominators."""
    close_ids: tuple[int, ...] = ()
    """Ids that are injected after the thought and never trained."""
    penalty: float = 0.0
    """Nats subtracted from the thought's reward."""


NOT_USED = ThoughtUse(counted=False)

Rule = Callable[[Prompt, float], ThoughtUse]
"""How a thought that did not close itself is used, given its prompt and `sampling.cut_penalty`."""


def mask(prompt: Prompt, penalty: float) -> ThoughtUse:
    """Leave the thought out."""
    return NOT_USED


def force_close(prompt: Prompt, penalty: float) -> ThoughtUse:
    """Inject the close tag and use the thought like any other."""
    return ThoughtUse(close_ids=prompt.close_ids)


def penalise(prompt: Prompt, penalty: float) -> ThoughtUse:
    """Inject the close tag and subtract the penalty; without a close tag to inject there is no penalty."""
    return ThoughtUse(close_ids=prompt.close_ids, penalty=penalty if prompt.close_ids else 0.0)


RULES: Mapping[str, Rule] = {"mask": mask, "force_close": force_close, "penalise": penalise}


def use_of_thought(group: Group, index: int, rule: str, penalty: float = 0.0) -> ThoughtUse:
    """How thought `index` of a group is used.

    An aborted thought and one whose stored reward is NaN are not used. `rule` is one of `RULES`.
    """
    thought = group.thoughts[index]
    if thought.finish_reason is FinishReason.ABORT:
        return NOT_USED
    if group.rewards is not None and math.isnan(group.rewards[index]):
        return NOT_USED
    if thought.given or thought.finish_reason is FinishReason.CLOSE:
        return ThoughtUse()
    return RULES[rule](group.prompt, penalty)


def ids_before_answer(group: Group, index: int) -> tuple[int, ...]:
    """The ids that an answer follows: prompt, thought `index`, a close tag if it lacks one, joining ids."""
    use = use_of_thought(replace(group, rewards=None), index, "force_close")
    prompt, thought = group.prompt, group.thoughts[index]
    return (*prompt.token_ids, *thought.token_ids, *use.close_ids, *prompt.join_ids)
