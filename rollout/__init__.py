"""Engines that sample thoughts: token ids in, token ids and log-probabilities out."""

from rollout.engine import Engine
from rollout.hf import HFEngine
from rollout.types import (
    Document,
    FinishReason,
    Group,
    Position,
    Prompt,
    SamplingParams,
    Thought,
    WeightSource,
)

__all__ = [
    "Document",
    "Engine",
    "FinishReason",
    "Group",
    "HFEngine",
    "Position",
    "Prompt",
    "SamplingParams",
    "Thought",
    "WeightSource",
]
