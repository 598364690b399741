"""BOW: the thought has to carry everything, since the scorer does not see the context (arXiv 2506.13502).

The policy reads the context x and writes a thought c. A scorer reads the thought alone and predicts the
target y. The reward is the probability

    r(c) = p_scorer(y | c),

so a thought earns nothing by leaving the work to a reader who knows x. The scorer is the model of `baseline`:
the initial model under `frozen`, as in the paper, or a moving average under `ema`. It reads the open tag, the
thought, the close tag and the target, after a beginning-of-text token if the document starts with one.
Advantages are leave-one-out. Changing the context changes no reward of a given thought.

`show_context: true` is the control: the scorer reads what the policy reads. The reward is then that of
`likelihood` with `score: prob`, by the scorer instead of the live policy.

Read from abstracts and summaries. Our choices: no instruction to the scorer, which in the paper is a tuned
model that is told what it reads; leave-one-out (the paper: GRPO); targets of several tokens. Left out: the
optional L1 term against naming the answer, whose formula we did not find. Watch `thought/leakage` instead.

Pitfalls: a thought that names the target is the best of all, and a base scorer may give its text little
probability anyhow, as it never saw a thought without a context. Cut-off thoughts need `sampling.cut`
force_close or penalise. The probability of a long target is 0: keep `target_length` at a word.
`loss.reader_coef` trains the policy's own reader, which sees the context; the reward does not depend on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from rewards import target_probability
from rlpretrain.objectives import base
from rlpretrain.types import Scores
from rollout.types import Group, Prompt


@dataclass(kw_only=True)
class Config(base.Config):
    """BOW's own field."""

    show_context: bool = False
    """Control: the scorer reads the policy's whole prompt before the thought."""


class BOW(base.Objective):
    """Reward a thought by the probability of what follows, to a scorer that sees the thought alone."""

    Config = Config
    needs = frozenset({"target", "target_baseline"})
    refused_baselines = frozenset({"none", "self"})

    def baseline_prompt(self, group: Group) -> Prompt:
        """The policy's prompt without context and template: the open tag, after a beginning of text."""
        if self.config.show_context:
            return group.prompt
        ids, bos = group.prompt.token_ids, self.template.bos
        begin = ids[:1] if bos is not None and ids[:1] == (bos,) else ()
        return replace(group.prompt, token_ids=(*begin, self.template.open_id))

    def reward(self, groups: Sequence[Group], scores: Scores) -> Tensor:
        """p(target | thought) [B, G] under the scorer."""
        assert scores.target_baseline is not None, "the run provides what is needed"
        return target_probability(scores.target_baseline, scores.target_mask)


OBJECTIVE = BOW
