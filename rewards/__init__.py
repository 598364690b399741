"""Rewards of reinforcement pretraining in pure torch: log-probabilities, gains, advantages, ratios."""

from rewards.advantages import (
    batch_normalized,
    group_normalized,
    leave_one_out,
    max_rl,
    zero_variance_fraction,
)
from rewards.candidates import candidate_logps, top_logps
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
from rewards.probability import (
    VR_CLI_STEPS,
    debiased_probability,
    log_complement,
    multi_sample_bound,
    perplexity_gain,
    target_logp,
    target_probability,
)

__all__ = [
    "VR_CLI_STEPS",
    "CollapseMonitor",
    "ImportanceRatio",
    "batch_normalized",
    "candidate_logps",
    "debiased_probability",
    "distinct_n",
    "empty",
    "filler",
    "group_normalized",
    "importance_ratio",
    "information_gain",
    "leave_one_out",
    "log_complement",
    "max_rl",
    "multi_sample_bound",
    "other_document",
    "perplexity_gain",
    "repetition",
    "row_entropies",
    "shuffled",
    "target_leakage",
    "target_logp",
    "target_probability",
    "token_logps",
    "token_logps_from_logits",
    "top_logps",
    "zero_variance_fraction",
]
