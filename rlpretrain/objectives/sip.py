"""Self-Improving Pretraining: a judge chooses among continuations of a prefix (arXiv 2601.21343).

A document is cut into a prefix and the next `target_length` tokens. Candidates for these are the document's
own `suffix`, a `rewrite` of it (a column of the data) and `rollouts` of the policy. A judge scores them
(rlpretrain/preferences.py), and with y_w the best and y_l the worst of a prefix x the loss is

    dpo:     −log σ(z),   z = r(y_w) − r(y_l),   r(y) = β [log π(y | x) − log p_ref(y | x)]
    rf_nll:  −log π(y_w | x)

as the mean over prefixes, where p_ref is the model at the start. Both enter as detached advantages of the
surrogate, whose ratio is 1: the gradient of −log σ(z) is that of −A_w log π(y_w) − A_l log π(y_l) with
A_w = β σ(−z) = −A_l. Candidates are data for the loss, so their sampler has no importance weight. Only the
candidates that enter the loss are scored by the trainer.

A prefix whose candidates are all equally good gives no update, and the mean is over the others; under rf_nll
candidates that are all the same text are one, which is trained. Ties for the
best or the worst go to the first candidate in the order of `candidates`. There is no schedule: rollouts are
chosen once the judge prefers them.

With the suffix alone, rf_nll is next-token prediction on it; with suffix and rewrite, filtered fine-tuning;
with rollouts alone, expert iteration. β = 0 gives no update.

Our choices: β (the paper has no value), the order of ties, what a pivot scores, the mean over prefixes with a
preference, `min_preferred`, one verdict for a question (the paper averages 5). The paper adds up judges of
quality, safety and factuality; here a `judge_function` may do so.

Pitfalls: judges prefer long and complete texts, so `objective/judge_length_corr` is logged. A policy that is
judged on one axis finds what is empty on the others (safe gibberish): watch the loss on clean held-out text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator
from torch import Tensor

from rlpretrain.config import Amount, ConfigError, Count, PretrainConfig
from rlpretrain.config.optim import Share
from rlpretrain.judge import Ask, Judge, by_path, endpoint, no_judge
from rlpretrain.objectives import base
from rlpretrain.objectives.candidates import (
    Selection,
    best_and_worst,
    check_rewrites,
    choose,
    given_thought,
    ids_after,
    only,
    whole,
)
from rlpretrain.objectives.sampling import group_id
from rlpretrain.preferences import CRITERION, Candidates, Failure, Form, score_candidates
from rlpretrain.types import Document, Scores
from rollout.engine import Engine
from rollout.types import FinishReason, Group, Position, Prompt

Kind = Literal["suffix", "rewrite", "rollouts"]


@dataclass(kw_only=True)
class Config(base.Config):
    """SIP's own fields."""

    target_length: Count = 128
    """Longest candidate in tokens, 128 in the paper; `sampling.max_thought_tokens` must be the same."""
    candidates: Annotated[
        tuple[Kind, ...], BeforeValidator(lambda v: v.split(",") if isinstance(v, str) else v)
    ] = ("suffix", "rollouts")
    """What is judged: suffix, rewrite, rollouts (`sampling.thoughts` of them).
    The order decides ties, and the first is the pivot.
    """
    loss: Literal["dpo", "rf_nll"] = "dpo"
    """dpo: raise the best candidate above the worst. rf_nll: the negative log-likelihood of the best."""
    beta: Amount = 0.1
    """dpo: β, per nat. Our choice: the paper gives no value."""
    rollouts_from: Share = 0.0
    """Share of the run before which no rollouts are drawn. 0 in the paper."""
    min_preferred: Share = 0.0
    """A step (on each rank, its part) with a smaller share of prefixes with a preference trains on none."""
    rewrite_column: str | None = None
    """Column with the rewritten answer, in place of `data.answer_column`; name it in `data.meta_columns` too.
    A document without one has no such candidate.
    """
    judge: Form = "pairwise"
    """pairwise: all pairs in both orders. pivot: each against the first candidate. pointwise: each alone."""
    criterion: str = CRITERION
    """What makes a continuation better, as the end of `decide which of them`."""
    judge_url: str | None = None
    """OpenAI-compatible server of the judge, without /v1."""
    judge_function: str | None = None
    """A judge of your own: package.module:function, an async function from prompts to replies."""
    judge_model: str = "judge"
    """The judge's name on the server."""
    judge_key: str | None = None
    """Environment variable that holds the server's token."""
    judge_timeout: Amount = 60.0
    """Seconds to wait for a reply before the request is repeated (three times)."""
    judge_failure: Failure = "zero"
    """What could not be judged. zero: a comparison is won by neither candidate, a number is 0. leave_out: it
    is in no mean, and a candidate without a verdict is not chosen.
    """


class SIP(base.Objective):
    """Train on the continuations that a judge prefers."""

    Config = Config
    importance_weights = False
    fewest_thoughts = 1
    token_reduction = "sum"

    def __init__(self, config: Any, tokenizer: Any):
        super().__init__(config, tokenizer)
        self.needs, self.live_rewards = self.needs - {"target"}, config.loss == "dpo"
        if config.loss == "dpo":
            self.needs = self.needs | {"reference"}
        if not config.candidates or len(set(config.candidates)) < len(config.candidates):
            raise ConfigError("objective.candidates: name suffix, rewrite or rollouts, each once")
        for name in ("template", "no_think"):
            if getattr(config, name) != "raw":
                raise ConfigError(f"objective.{name}: sip continues the text itself and has no thoughts")
        self.counts = {"asked": 0, "cached": 0, "failed": 0}
        ask: Ask = no_judge  # `check_run` refuses that where there is a choice
        if config.judge_function:
            ask = by_path(config.judge_function)
        elif config.judge_url:
            options = {"key": config.judge_key, "timeout": config.judge_timeout}
            ask = endpoint(config.judge_url, config.judge_model, **options)
        self.judge = Judge(ask, "leave_out", self.counts)
        self.selection = Selection()

    def check_run(self, run: PretrainConfig) -> None:
        """Raise ConfigError for what would make the loss another one than the paper's."""
        c, s = self.config, run.sampling
        if self.judge.ask is no_judge and (len(c.candidates) > 1 or "rollouts" in c.candidates):
            raise ConfigError("objective.judge_url or objective.judge_function: sip needs a judge; set one")
        if s.temperature != 1:
            raise ConfigError(
                f"sampling.temperature is {s.temperature:g}: candidates are scored at it, but the losses of "
                "sip are about the policy at 1. Set it to 1"
            )
        if run.loss.inner_epochs > 1:
            raise ConfigError(
                f"loss.inner_epochs is {run.loss.inner_epochs}: the advantages of sip are the derivative of "
                "its loss at the first update only. Set it to 1"
            )
        if c.loss == "dpo" and run.loss.reduction not in ("auto", "sum"):
            raise ConfigError(f"loss.reduction {run.loss.reduction}: dpo sums over tokens; set sum or auto")
        sampled = s.thoughts if "rollouts" in c.candidates else 0
        if sampled and s.max_thought_tokens != c.target_length:
            raise ConfigError(
                f"sampling.max_thought_tokens is {s.max_thought_tokens}, but objective.target_length is "
                f"{c.target_length}: rollouts and suffixes have the same length. Make them equal"
            )
        given = len(set(c.candidates) - {"rollouts"})
        least = 2 if c.loss == "dpo" else 1
        if sampled + given < least:
            raise ConfigError("objective.candidates has only one candidate: dpo needs a best and a worst")
        if sampled and c.rollouts_from > 0 and given < least:
            raise ConfigError(
                f"objective.rollouts_from is {c.rollouts_from:g}, and before it objective.candidates has "
                f"{given} of the {least} that loss {c.loss} needs: add suffix or rewrite, or set it to 0"
            )
        check_rewrites(c, run)

    def window(self, size: int, thought_tokens: int | None = None) -> Any:
        """Candidates have up to `target_length` tokens, whatever `sampling.max_thought_tokens` is."""
        return super().window(size, self.config.target_length)

    def positions(self, document: Document, rng: Any, trunk: Tensor | None = None) -> list[Position]:
        """Where suffixes begin; `suffix_ids` holds the rewrite, which is in no prompt."""
        places = super().positions(document, rng, trunk)
        if "rewrite" not in self.config.candidates:
            return places
        text = (document.meta or {}).get(self.config.rewrite_column)
        if not isinstance(text, str) or not text.strip():
            return places
        out = []
        for place in places:
            before = [i for i in place.context_ids if i not in self.picker.special]
            ids = ids_after(before, text, self.tokenizer, self.reader)
            if document.token_ids[-1] == self.tokenizer.eos_token_id:
                ids = [*ids, self.tokenizer.eos_token_id]
            out.append(replace(place, suffix_ids=tuple(ids[: self.config.target_length])))
        return out

    def prompt(self, position: Position) -> Prompt:
        """The prefix alone; a rollout ends by its length or with an end-of-text token."""
        return Prompt(position.context_ids, ())

    async def sample_thoughts(
        self,
        engine: Engine,
        positions: Sequence[Position],
        prompts: Sequence[Prompt],
        seeds: Sequence[int],
        role: str = "policy",
    ) -> list[Group]:
        """All candidates of each position; `extra["kinds"]` says what each is."""
        if "rollouts" in self.config.candidates and self.progress >= self.config.rollouts_from:
            groups = await super().sample_thoughts(engine, positions, prompts, seeds, role)
        else:
            parts = zip(positions, prompts, seeds, strict=True)
            groups = [
                Group(group_id(p, s), p, prompt, (), engine.version, role=role) for p, prompt, s in parts
            ]
        return [self._with_given(group) for group in groups]

    def _with_given(self, group: Group) -> Group:
        """The group with suffix and rewrite among its rollouts, which are whole whatever ended them."""
        thoughts, kinds = [], []
        for kind in self.config.candidates:
            if kind == "rollouts":
                own = [t if t.finish_reason is FinishReason.ABORT else whole(t) for t in group.thoughts]
            else:
                ids = group.position.target_ids if kind == "suffix" else group.position.suffix_ids
                own = [given_thought(ids, group.policy_version)] if ids else []
            thoughts += own
            kinds += [kind] * len(own)
        return replace(group, thoughts=tuple(thoughts), extra=group.extra | {"kinds": kinds})

    async def add_rewards(self, engine: Engine, groups: list[Group]) -> list[Group]:
        """The groups with the judge's scores; NaN for a rollout that was aborted or could not be judged."""
        c, places, sets = self.config, [], []
        for group in groups:
            judged = [g for g, t in enumerate(group.thoughts) if t.finish_reason is not FinishReason.ABORT]
            context = group.position.context_ids
            texts = [self._text(group.thoughts[g].token_ids, after=context) for g in judged]
            places.append(judged)
            sets.append(Candidates(self._text(context), texts))
        scores = await score_candidates(self.judge, sets, c.judge, c.criterion, c.judge_failure)
        out = []
        for group, judged, own in zip(groups, places, scores, strict=True):
            by_place = dict(zip(judged, own, strict=True))
            rewards = tuple(by_place.get(g, math.nan) for g in range(len(group.thoughts)))
            out.append(replace(group, rewards=rewards))
        return out

    def _text(self, ids: Sequence[int], after: Sequence[int] = ()) -> str:
        return self.reader.text([i for i in ids if i not in self.picker.special], after)

    def select(self, groups: Sequence[Group]) -> list[Group]:
        """The prefixes with a preference, and of each the candidates in the loss: best and worst, or best."""
        kept = []
        for group in groups:
            choice = choose(group, only_best=self.config.loss == "rf_nll")
            self.selection.add(group, choice)
            if choice is not None:
                kept.append(only(group, choice))
        return kept if len(kept) >= self.config.min_preferred * len(groups) else []

    def notes(self) -> dict[str, float]:
        """What was chosen in this step, and what the judge was asked since the last."""
        counts = dict(self.counts)
        self.counts.update(dict.fromkeys(counts, 0))
        return self.selection.take() | {
            "objective/judge_asked": counts["asked"],
            "objective/judge_cached": counts["cached"],
            "objective/judge_failed_frac": counts["failed"] / max(counts["asked"], 1),
        }

    def reward(self, groups: Sequence[Group], scores: Scores) -> Tensor:
        """dpo: r [B, G], β times the log-ratio to the reference. rf_nll: the judge's scores."""
        if self.config.loss == "rf_nll":
            return super().reward(groups, scores)
        assert scores.thought_reference is not None, "the run provides what is needed"
        ratios = scores.thought_logps.double() - scores.thought_reference.double()
        return self.config.beta * ratios.sum(-1)

    def advantage(self, reward: Tensor, groups: Sequence[Group]) -> Tensor:
        """The detached derivative [B, G] of the loss, times a group's thoughts: the loss divides by all."""
        out = torch.zeros_like(reward, dtype=torch.float64)
        for b, group in enumerate(groups):
            choice = best_and_worst(group.rewards or ())
            if choice is None:
                continue
            best, worst = choice
            number = sum(not math.isnan(score) for score in group.rewards or ())
            if self.config.loss == "rf_nll":
                out[b, best] = number
            elif best != worst:
                weight = self.config.beta * torch.sigmoid(reward[b, worst] - reward[b, best])
                out[b, best], out[b, worst] = number * weight, -number * weight
        return out


OBJECTIVE = SIP
