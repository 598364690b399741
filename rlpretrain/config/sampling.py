"""Section `sampling`: how thoughts are drawn."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field
from pydantic.dataclasses import dataclass

from rlpretrain.config.base import STRICT, Count
from rollout.types import sane_temperature


@dataclass(config=STRICT, kw_only=True)
class SamplingConfig:
    """How thoughts are drawn."""

    thoughts: int = 16
    """G, thoughts per position."""
    temperature: Annotated[float, AfterValidator(sane_temperature)] = 1.0
    """Sampling temperature, at least .01 (0: greedy); targets are always scored at 1."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus; below 1 the importance ratios are biased."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Keep only the k likeliest tokens; 0 keeps all."""
    banned_tokens: tuple[str, ...] = ()
    """Tokens that are never sampled, by their text: control tokens of the base model, for instance.
    Importance ratios are biased by the probability that the model gives them.
    """
    max_thought_tokens: Count = 256
    """Longest thought, close tag included. A base that never saw the tags closes no thought at first, so at
    first every thought is this long. `recipe: paper` sets the paper's 2048.
    """
    cut: Literal["mask", "force_close", "penalise"] = "penalise"
    """A thought that did not close itself: counts nowhere (mask), is closed for it (force_close), or is
    closed for it and loses `cut_penalty` (penalise). Our choice: under `mask` a base that never saw the tags
    learns nothing (NOTES.md).
    """
    cut_penalty: float = 1.0
    """Nats taken from the reward of an unclosed thought under `cut: penalise`. Our choice."""
