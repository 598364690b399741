"""Engines that sample thoughts: token ids in, token ids and log-probabilities out."""

from rollout.engine import Engine, EngineInfo
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
    "EngineInfo",
    "FinishReason",
    "Group",
    "HFEngine",
    "Position",
    "Prompt",
    "SamplingParams",
    "Thought",
    "WeightSource",
]
