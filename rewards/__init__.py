"""Rewards of reinforcement pretraining as pure torch maths: log-probabilities, information gain, advantages, ratios."""

from rewards.advantages import batch_normalized, group_normalized, leave_one_out, zero_variance_fraction
from rewards.controls import (
    CollapseMonitor,
    distinct_n,
    empty,
    filler,
    other_document,
    repetition,
    shuffled,
    target_leakage,
)
from rewards.importance import ImportanceRatio, importance_ratio
from rewards.information_gain import information_gain
from rewards.likelihood import row_entropies, token_logps, token_logps_from_logits

__all__ = [
    "CollapseMonitor",
    "ImportanceRatio",
    "batch_normalized",
    "distinct_n",
    "empty",
    "filler",
    "group_normalized",
    "importance_ratio",
    "information_gain",
    "leave_one_out",
    "other_document",
    "repetition",
    "row_entropies",
    "shuffled",
    "target_leakage",
    "token_logps",
    "token_logps_from_logits",
    "zero_variance_fraction",
]
