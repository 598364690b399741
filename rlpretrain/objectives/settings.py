"""Settings of an objective: the fields of its configuration section, and the values that the run sets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import Tensor

from rewards import group_normalized, leave_one_out, max_rl
from rollout.types import SamplingParams

NEEDS = {
    "target": "log-probs of the targets, after the thoughts and without them",
    "reference": "log-probs of trunk and thoughts under `reference.path`, by default the initial model",
    "second_model": "a reference model that is not the initial one: `reference.path`",
    "initial": "log-probs of the trunk under the frozen initial model, beside those of the reference",
    "target_baseline": "log-probs of the targets after the thoughts under the model of `baseline`",
    "teacher": "likeliest tokens under `reference.path`, by default the initial model: for `soft_targets`",
    "entropy": "the entropy of each token of a document, for `positions`",
    "batch": "`advantage` sees all groups of a step at once, those of all ranks, ordered by their ids",
    "group": "`reward` and `target_weights` see a whole group: it may not be spread over micro-batches",
    "ntp_data": "a second stream of documents",
    "learner": "the trained model itself, for `start` and `before_step`: likeliest tokens, gradients, shifts",
}
"""What an objective can ask of a run. Each need is read somewhere; a test checks that."""


AdvantageForm: TypeAlias = Literal["leave_one_out", "group_normalised", "max_rl"]
"""How an objective with the field `advantage` compares the thoughts of a group: `ADVANTAGES`."""
ADVANTAGES: Mapping[AdvantageForm, Callable[[Tensor], Tensor]] = {
    "leave_one_out": leave_one_out,
    "group_normalised": group_normalized,
    "max_rl": max_rl,
}
"""Advantages [B, G] from rewards [B, G]; the formulas and their sources are in rewards/advantages.py."""


@dataclass(kw_only=True)
class Config:
    """The fields that every objective with thoughts has; an objective's own `Config` extends it."""

    positions: str = "random"
    """random, every_k, entropy, before, after, sentence, answer, or package.module:function."""
    positions_per_document: int = 1
    """Positions drawn in each document; 1 in the paper."""
    target_length: int = 1
    """Tokens predicted after the thought; 1 in the paper."""
    min_context: int = 1
    """Fewest tokens before a position."""
    marker: str | None = None
    """Text that positions `before` and `after` look for."""
    every: int = 16
    """Stride of positions `every_k`."""
    top_fraction: float = 0.2
    """Positions `entropy` draws among this share of a document's highest next-token entropies."""
    template: str = "raw"
    """raw: the thought begins inside the document. rlp: the paper's system prompt in our words. expert: an
    instruction to comment on a whole document, for `rlpretrain augment`. Or a text with {context}.
    """
    no_think: str = "raw"
    """The context of the no-think arm: raw (the document), template, or empty_thought."""
    open: str = "<think>"
    """Delimiter that opens a thought; added to the tokenizer if it is missing."""
    close: str = "</think>"
    """Delimiter that closes a thought; added to the tokenizer if it is missing."""


@dataclass(frozen=True, slots=True)
class Setting:
    """Values that the run sets for its objective; constant during a batch."""

    params: SamplingParams
    """How thoughts are sampled."""
    thoughts: int
    """G, thoughts per position."""
    reader_coef: float
    """Weight of the reader term."""
    reduction: str = "thought_mean"
    """How the tokens of a thought are weighted in the loss."""
    progress: float = 0.0
    """The share of the run that is done when the batch is trained, 0 to 1."""


DEFAULT_SETTING = Setting(SamplingParams(max_thought_tokens=1), thoughts=2, reader_coef=0.0)
"""The setting of an objective before a run sets it."""
