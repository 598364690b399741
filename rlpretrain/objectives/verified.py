r"""RL with verifiable rewards: think, answer, and be judged by a program that reads both.

A document is a prompt and its answer (`data.answer_column`). The model thinks after the prompt, closes its
thought, and writes an answer, which ends with `closing`. A verifier reads the texts of the question, the
trace and the answer, and nothing else: what is true follows from the question's token ids. The rewards:

- `outcome`: 1 if the answer is right, however it was reached.
- `process`: the share of the needed steps that the trace has and that are right.
- `strict`: 1 if the answer and all of the trace are right.
- `mixed`: alpha * outcome + (1 - alpha) * process. Alpha 1 is `outcome`.

These are the formulas of "Interplay" (arXiv 2512.07783; its code also subtracts for extra steps), without
its KL term. Thought and answer are one sampled sequence and trained alike. A thought without a close tag, or
whose answer has no end, is wrong: reward 0, and counted in the metric verified/truncated. `sampling.cut:
mask` would leave such thoughts out, so it is refused; `penalise` makes them worse than wrong.

It is the RL stage after pretraining. Two controls belong to it: supervised training on the same problems
(`sft_mixed`), and `random_reward`. An answer alone is weak evidence: a base can be right with wrong traces
(verified/lucky).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import Tensor

from rlpretrain.config import ConfigError, Count
from rlpretrain.objectives import base
from rlpretrain.verdict import WRONG, Verdict, find_verifier
from rollout.engine import Engine
from rollout.types import FinishReason, Group, Thought

GRAPHS = "rlpretrain.corpora.graphs:verify"


@dataclass(kw_only=True)
class Config(base.Config):
    """The objective's own fields."""

    positions: str = "answer"
    """At the answer, where `data.answer_column` puts it; or another kind that ends a whole question."""
    reward: Literal["outcome", "process", "strict", "mixed"] = "outcome"
    """What a thought earns; see the objective's documentation."""
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Weight of the outcome under `mixed`; the paper's code has .2."""
    verifier: str = GRAPHS
    """package.module:function from the texts of question, trace and answer to a rlpretrain.verdict.Verdict.
    By default that of the graphs corpus.
    """
    closing: str = "."
    """Text that ends an answer, and its sampling."""
    max_answer_tokens: Count = 8
    """Longest answer, `closing` included."""
    advantage: base.AdvantageForm = "leave_one_out"
    """How the thoughts of a group are compared: leave_one_out, group_normalised (GRPO) or max_rl."""


class Verified(base.Objective):
    """Reward a thought and its answer as a verifier judges them."""

    Config = Config
    needs = frozenset()
    refused_cuts = frozenset({"mask"})

    def __init__(self, config: Any, tokenizer: Any):
        super().__init__(config, tokenizer)
        if not config.closing:
            raise ConfigError("objective.closing is empty: name the text that ends an answer")
        self.answer_tokens = config.max_answer_tokens
        self.verifier = find_verifier(config.verifier, "objective.verifier")
        self.step_notes: dict[str, float] = {}

    async def add_rewards(self, engine: Engine, groups: list[Group]) -> list[Group]:
        """The groups with their rewards, and the verdicts in `extra`; null stands for a truncated thought."""
        return [self.judge_group(group) for group in groups]

    def judge_group(self, group: Group) -> Group:
        """A group with rewards and verdicts. ConfigError for a question that the verifier cannot read."""
        verdicts = [self.verdict(group, thought) for thought in group.thoughts]
        rewards = tuple(self.reward_of(verdict or WRONG) for verdict in verdicts)
        stored = [None if verdict is None else asdict(verdict) for verdict in verdicts]
        return replace(group, rewards=rewards, extra=group.extra | {"verdicts": stored})

    def verdict(self, group: Group, thought: Thought) -> Verdict | None:
        """The verdict on a thought and its answer; None if one of the two has no end."""
        if thought.finish_reason is not FinishReason.CLOSE or thought.answer_span is None:
            return None
        question = question_text(self, group.position.context_ids)
        trace = trace_text(self, group, thought.token_ids[: thought.answer_span[0]])
        try:
            return self.verifier(question, trace, self.answer_text(thought))
        except ValueError as error:
            raise ConfigError(
                f"document {group.position.document_id}: objective.verifier {self.config.verifier} cannot "
                f"read the question '{question[:200]}': {error}"
            ) from None

    def reward_of(self, verdict: Verdict) -> float:
        """The reward that a verdict gives."""
        outcome = float(verdict.answer_right)
        if self.config.reward == "outcome":
            return outcome
        if self.config.reward == "process":
            return verdict.process
        if self.config.reward == "strict":
            return float(verdict.verified)
        return self.config.alpha * outcome + (1 - self.config.alpha) * verdict.process

    def advantage(self, reward: Tensor, groups: Sequence[Group]) -> Tensor:
        """Advantages [B, G] in the form of the field `advantage`."""
        return base.ADVANTAGES[self.config.advantage](reward)

    def select(self, groups: Sequence[Group]) -> list[Group]:
        """All groups; their verdicts become the step's `notes`, in a replay too."""
        self.step_notes = summarise(groups)
        return super().select(groups)

    def notes(self) -> dict[str, float]:
        """Means over the thoughts of the step's groups."""
        return self.step_notes


def question_text(objective: base.Objective, context_ids: Sequence[int]) -> str:
    """The text of a position's context, without special tokens; an unknown word stays one."""
    dropped = objective.picker.special - {objective.tokenizer.unk_token_id}
    return objective.reader.text([i for i in context_ids if i not in dropped])


def trace_text(objective: base.Objective, group: Group, thought_ids: Sequence[int]) -> str:
    """The text of a thought, without the close tag that ends it."""
    ends = thought_ids[-1:] == (objective.template.close_id,)
    return objective.reader.text(thought_ids[:-1] if ends else thought_ids, after=group.prompt.token_ids)


def summarise(groups: Sequence[Group]) -> dict[str, float]:
    """Means of the verdicts over all thoughts; one that was truncated is wrong."""
    stored = [verdict for group in groups for verdict in group.extra.get("verdicts", ())]
    if not stored:
        return {}
    verdicts = [WRONG if fields is None else Verdict(**fields) for fields in stored]
    columns = {
        "verified": [verdict.verified for verdict in verdicts],
        "answer_right": [verdict.answer_right for verdict in verdicts],
        "lucky": [verdict.lucky for verdict in verdicts],
        "process": [verdict.process for verdict in verdicts],
        "malformed": [verdict.malformed for verdict in verdicts],
        "truncated": [fields is None for fields in stored],
    }
    return {f"verified/{name}": math.fsum(values) / len(values) for name, values in columns.items()}


OBJECTIVE = Verified
