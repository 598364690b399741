"""What a verifier says about the thoughts of an evaluation: verified@k, and the share of right steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlpretrain.config import ConfigError
from rlpretrain.objectives import Objective
from rlpretrain.objectives.verified import question_text, trace_text
from rlpretrain.verdict import WRONG, Verdict, Verifier
from rollout.types import FinishReason, Group


@dataclass(frozen=True, slots=True)
class Verdicts:
    """The verdicts on n thoughts at each of P positions. A thought that did not close itself is wrong."""

    verified: np.ndarray  # [P, n] bool
    process: np.ndarray  # [P, n] share of the needed steps that are right

    def where(self, keep: Sequence[bool]) -> Verdicts:
        """Those of some positions."""
        kept = np.asarray(keep, bool)
        return Verdicts(self.verified[kept], self.process[kept])


def judge_traces(
    verifier: Verifier, objective: Objective, groups: Sequence[Group], answers: Sequence[Sequence[str]]
) -> Verdicts:
    """The verdicts on the thoughts of `groups` with the texts of their answers.

    Raises ConfigError for a question that the verifier cannot read.
    """
    verdicts: list[list[Verdict]] = []
    for group, texts in zip(groups, answers, strict=True):
        question = question_text(objective, group.position.context_ids)
        row = []
        for thought, answer in zip(group.thoughts, texts, strict=True):
            if thought.finish_reason is not FinishReason.CLOSE:
                row.append(WRONG)
                continue
            trace = trace_text(objective, group, thought.token_ids)
            try:
                row.append(verifier(question, trace, answer))
            except ValueError as error:
                raise ConfigError(
                    f"--verifier cannot read the question of document {group.position.document_id}, "
                    f"'{question[:200]}': {error}"
                ) from None
        verdicts.append(row)
    verified = [[verdict.verified for verdict in row] for row in verdicts]
    process = [[verdict.process for verdict in row] for row in verdicts]
    return Verdicts(np.array(verified, bool), np.array(process, float))
