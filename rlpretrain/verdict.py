"""What a verifier says about a trace and an answer, and how a configuration names a verifier."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from rlpretrain.config import ConfigError
from rlpretrain.config.plugins import find


@dataclass(frozen=True, slots=True)
class Verdict:
    """The judgement of one trace and the answer after it."""

    process: float
    """Share of the needed steps that the trace has and that are right, 0 to 1."""
    answer_right: bool
    """Whether the answer is the true one, however it was reached."""
    verified: bool
    """Whether all needed steps are right, nothing that the trace says is false, and the answer is right."""
    malformed: int = 0
    """Clauses of the trace that could not be read; they count as not said."""

    @property
    def lucky(self) -> bool:
        """Whether the answer is right although the trace is not."""
        return self.answer_right and not self.verified


WRONG = Verdict(process=0.0, answer_right=False, verified=False)
"""The verdict on a thought without an end, whatever it says."""
Verifier = Callable[[str, str, str], Verdict]
"""From the texts of question, trace (without tags) and answer to the verdict.

It raises ValueError for a question that it cannot read.
"""


def find_verifier(name: str, setting: str) -> Verifier:
    """The verifier at `package.module:function`; `setting` is the field or option that names it."""
    verifier = find(name, setting)
    if not callable(verifier):
        raise ConfigError(f"{setting}: '{name}' is no function (question, trace, answer) -> Verdict")
    return cast(Verifier, verifier)  # its signature is known when it is called
