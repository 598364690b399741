"""Distillation in pretraining: SALT (arXiv 2410.18779) and self-distillation (arXiv 2210.02871).

A frozen teacher gives its K likeliest tokens of each prediction. Until a share `until` of the run, a document
token's loss is the cross-entropy with a mixture of the token itself and the teacher's distribution,

    L_t = (1 − ω) · −log p_θ(x_t) + ω · Σ_j q_tj · −log p_θ(j),     q_t = softmax over the K of z_T(j) / τ,

and after it exactly the next-token loss. In SALT the teacher is smaller than the learner; its soft targets
help early and hold back late, so they end early. In self-distillation the learner starts again from the base
and the teacher is that base, or the base after further pretraining (`reference.path`).

We read reviews of SALT and the abstract of the other paper. Our choices: ω, K, τ, a tail that is dropped, the
bounds of `selection`; 2210.02871 compares hidden states, and we compare predictions. The learner's
temperature is 1.

ω = 0 or `until` 0 is `ntp`. A teacher that is the learner, over the whole vocabulary, has no gradient in the
soft part. Two controls: `teacher: uniform` is label smoothing of the same mass; `random` keeps the teacher's
probabilities, but gives them to other tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from rewards.tiled_logps import EVERY_TOKEN
from rlpretrain.config import ConfigError, Count
from rlpretrain.objectives.base import ReadLikeliest
from rlpretrain.objectives.ntp import NTP
from rlpretrain.types import Document, MicroBatch, SoftTargets

UNTIL = {"salt": 0.17, "self": 1.0}
"""Shares of the run with soft targets: SALT's 36 of 208 thousand steps; all of it for self-distillation."""


@dataclass(kw_only=True)
class Config:
    """The teacher, its part in the loss, and the documents of the first stage."""

    kind: Literal["salt", "self"] = "salt"
    """salt: the teacher is `reference.path`, a smaller model. self: it is the model itself before training,
    or `reference.path`, the same base after further pretraining.
    """
    until: Annotated[float, Field(ge=0, le=1)] | None = None
    """Share of the run after which the loss is the next-token loss; by default .17 for salt (36 of 208
    thousand steps in the paper) and 1 for self.
    """
    weight: Annotated[float, Field(ge=0, le=1)] = 0.5
    """ω, the part of the soft targets in the loss. Our choice."""
    top_k: Count = 16
    """K, the likeliest tokens of the teacher; its whole vocabulary if that is smaller. Our choice."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """τ, by which the teacher's logits are divided."""
    tail: Literal["drop", "gold"] = "drop"
    """The teacher's probability outside its K tokens. drop: the K probabilities are divided by their sum.
    gold: it goes to the document's own token, so an unsure teacher counts less.
    """
    teacher: Literal["model", "uniform", "random"] = "model"
    """uniform: control, label smoothing: the soft part is uniform over the vocabulary; it needs no teacher.
    random: control, the teacher's probabilities on other tokens, by one random order of the vocabulary.
    """
    selection: Literal["none", "column", "teacher"] = "none"
    """Documents that are trained on as long as there are soft targets (SALT_DS), by a score within
    `score_min` and `score_max`. column: a number in `score_column`; other documents are not drawn. teacher:
    the median of the teacher's losses (at `temperature`) on tokens that are among its `learnable_k`
    likeliest; other documents count in the denominator, but not in the loss.
    """
    score_column: str | None = None
    """Column of the data with a score for each document; it must be among `data.meta_columns`."""
    score_min: float | None = None
    """Smallest score of a document that is trained on; not set: none. Below it, `teacher` finds it easy."""
    score_max: float | None = None
    """Largest score of a document that is trained on; not set: none."""
    learnable_k: Count = 10
    """A token among so many likeliest ones of the teacher is learnable (10 in the paper); at most `top_k`."""


class Distill(NTP):
    """Continue pretraining on the mixture of documents and a teacher's predictions."""

    Config = Config

    def __init__(self, config: Any, tokenizer: Any):
        super().__init__(config, tokenizer)
        _check(config)
        self.until = UNTIL[config.kind] if config.until is None else config.until
        if config.teacher != "uniform":
            self.needs = self.needs | {"teacher"}
            if config.kind == "salt":
                self.needs = self.needs | {"second_model"}
        if config.teacher == "random":
            generator = torch.Generator().manual_seed(0)
            self.order = torch.randperm(len(tokenizer), generator=generator)

    @property
    def in_first_stage(self) -> bool:
        """Whether the present batch has soft targets and selected documents."""
        return self.progress < self.until

    def prepare(self, document: Document, rng: Any) -> Document | None:
        """Drop a document of the first stage whose score is out of bounds."""
        if self.config.selection != "column" or not self.in_first_stage:
            return document
        return document if self._is_within(self._score_of(document)) else None

    def prepare_held_out(self, document: Document, rng: Any) -> Document | None:
        """Held-out documents all stay: the selection is one of training data."""
        return document

    def soft_targets(self, micro: MicroBatch, teacher: ReadLikeliest | None) -> SoftTargets | None:
        """The document's tokens [M, 1] beside the teacher's [M, K]."""
        config = self.config
        selects = config.selection == "teacher"
        if not self.in_first_stage or not (config.weight or selects):
            return None
        own = micro.trunk_labels[:, None]
        if config.teacher == "uniform":
            return self._mixed(own, torch.full_like(own, EVERY_TOKEN), torch.ones(own.shape).double())
        assert teacher is not None, "the run provides what is needed"
        top = teacher(micro, config.top_k, config.temperature)
        ids, logps = top.ids.to(own.device), top.logps.to(own.device).double()
        probs = logps.exp() if config.tail == "gold" else logps.softmax(-1)
        if config.teacher == "random":
            mixed = self._mixed(own, self._reorder(ids), probs)
        else:
            mixed = self._mixed(own, ids, probs)
        if not selects:
            return mixed
        kept = self._select(micro, ids == own, logps)
        return SoftTargets(mixed.ids, mixed.probs * kept[:, None])

    def _mixed(self, own: Tensor, ids: Tensor, probs: Tensor) -> SoftTargets:
        """(1 − ω) on the document's token, ω on the teacher's; what these lack of 1 is the document's too."""
        weight = self.config.weight
        missing = (1 - probs.sum(1, keepdim=True)).clamp(min=0) if self.config.tail == "gold" else 0.0
        gold = torch.ones(own.shape) * (1 - weight) + weight * missing
        return SoftTargets(torch.cat([own, ids], 1), torch.cat([gold, weight * probs], 1).float())

    def _reorder(self, ids: Tensor) -> Tensor:
        """Other tokens in place of these: one each, the same in the whole run; ids without a text stay."""
        return torch.where(ids < len(self.order), self.order[ids.clamp(max=len(self.order) - 1)], ids)

    def _select(self, micro: MicroBatch, is_own: Tensor, logps: Tensor) -> Tensor:
        """1 for each token [M] of a document whose median loss (nats) on learnable tokens is in bounds."""
        k = self.config.learnable_k
        learnable, losses = is_own[:, :k].any(1), -torch.where(is_own, logps, 0.0)[:, :k].sum(1)
        sizes = [len(document.token_ids) - 1 for document in micro.documents]
        kept = []
        for hits, of_tokens in zip(learnable.split(sizes), losses.split(sizes), strict=True):
            is_kept = bool(hits.any()) and self._is_within(float(np.median(of_tokens[hits].numpy())))
            kept.append(torch.full((len(hits),), float(is_kept)))
        return torch.cat([*kept, torch.zeros(0)])

    def _is_within(self, score: float) -> bool:
        low, high = self.config.score_min, self.config.score_max
        return not math.isnan(score) and (low is None or low <= score) and (high is None or score <= high)

    def _score_of(self, document: Document) -> float:
        """The document's score; ConfigError where the data has none."""
        column = self.config.score_column
        score = (document.meta or {}).get(column)
        try:
            return float(score)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            raise ConfigError(
                f"objective.score_column '{column}': document {document.id} has {score!r}, not a number: "
                "name a column of scores, in data.meta_columns too"
            ) from None


def _check(config: Config) -> None:
    """Raise ConfigError for settings that do not fit each other."""
    if (config.selection == "column") != (config.score_column is not None):
        raise ConfigError(
            "objective.selection: column and objective.score_column need each other: selection is "
            f"{config.selection}, score_column is {config.score_column}"
        )
    low, high = config.score_min, config.score_max
    if (config.selection != "none") != (low is not None or high is not None):
        raise ConfigError(
            "objective.selection needs objective.score_min or objective.score_max, and they need it: "
            f"selection is {config.selection}, the bounds are {low} and {high}"
        )
    if low is not None and high is not None and low > high:
        raise ConfigError(f"objective.score_min {low} is above objective.score_max {high}")
    if config.selection == "teacher" and config.teacher == "uniform":
        raise ConfigError("objective.selection teacher: with teacher uniform there is none; use column")
    if config.selection == "teacher" and config.learnable_k > config.top_k:
        raise ConfigError(
            f"objective.learnable_k {config.learnable_k} is above objective.top_k {config.top_k}: "
            "the teacher gives only its top_k tokens"
        )


OBJECTIVE = Distill
