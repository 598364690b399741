"""Every number that is logged: its name, meaning and healthy range; how it is gathered; where it goes.

TRL's names where TRL has one; ours are ig/*, thought/*, baseline/*, ntp/*, reader/*, perf/*, run/*.
"""

from __future__ import annotations

from typing import Any

METRICS: dict[str, tuple[str, str]] = {
    "loss": ("the whole loss of the step", "falls slowly; jumps mean trouble"),
    "policy_loss": ("clipped surrogate; 0 on-policy with leave-one-out but for length weights", "around 0"),
    "reward": ("mean reward of counted thoughts", "rises"),
    "reward_std": ("mean standard deviation of rewards within a group", "above 0"),
    "frac_reward_zero_std": (
        "groups whose thoughts all earn the same",
        "below .9; near 1 nothing is learned",
    ),
    "ig/mean": ("information gain in nats against the baseline", "rises above 0"),
    "ig/std": ("deviation of the gain over all thoughts", "finite"),
    "ig/positive_frac": ("thoughts with a gain above 0", "rises above .5"),
    "ig/per_token": ("gain per target token", "rises above 0"),
    "ig/self": (
        "gain against the current model without a thought; flatters itself when that degrades",
        "near ig/frozen",
    ),
    "ig/frozen": ("gain against the initial model without a thought: the honest one", "rises above 0"),
    "ig/empty": (
        "the same for a thought without content: what the tags alone are worth",
        "well below ig/frozen",
    ),
    "thought/closed_frac": ("thoughts that closed themselves", "above .9"),
    "thought/eos_frac": ("thoughts that ended the document instead", "near 0"),
    "thought/uncounted_frac": ("thoughts that count nowhere (cut off, aborted)", "below .1"),
    "thought/leakage": ("overlap of thought and target n-grams", "no sudden rise"),
    "thought/repetition": ("repeated 4-grams within a thought", "below .3"),
    "completions/mean_length": ("tokens per thought", "no drift to 0 or to the limit"),
    "completions/max_length": ("longest thought", "below the limit"),
    "completions/clipped_ratio": ("thoughts cut off at the limit", "below .1"),
    "baseline/logp": ("mean log p(target) of the baseline", "steady"),
    "baseline/self": ("mean log p(target) of the current model without a thought", "not falling"),
    "ntp/loss": ("next-token loss of the trunk, nats per token", "not above its start"),
    "reader/loss": ("mean -log p(target | context, thought)", "falls"),
    "sampling/*": (
        "importance ratios and log-prob differences of sampler and trainer, raw and truncated",
        "ratio near 1",
    ),
    "clip_ratio/region_mean": ("thought tokens whose ratio was clipped", "below .2"),
    "grad_norm": ("gradient norm before clipping", "no jumps"),
    "learning_rate": ("as scheduled", ""),
    "num_input_tokens": ("tokens of the documents of all steps so far: what papers count", ""),
    "num_tokens": ("tokens that models read so far, in every pass: sampled, scored and trained ones", ""),
    "num_flops": ("6 N per trained token, 2 N per token that is only read, and attention, so far", ""),
    "step_time": ("seconds per step", "steady"),
    "perf/rollout_s": ("of it, sampling thoughts", ""),
    "perf/train_s": ("of it, scoring and updating", ""),
    "perf/sync_s": ("of it, handing weights to the engine", "near 0 embedded"),
    "sample/staleness_mean": (
        "steps between sampling thoughts and training on them",
        "0 synchronous, else up to max_staleness",
    ),
    "sample/staleness_max": ("the oldest of them", "at most max_staleness"),
    "perf/weight_sync_*": (
        "of the sync, with engines elsewhere: gather, write, drain, load",
        "small beside the step",
    ),
    "perf/probe_s": (
        "seconds of the probe after the sync, where the engine has weights of its own",
        "below 2% of the step",
    ),
    "sampling/probe_difference": (
        "largest difference in nats between engine and trainer on the probe",
        "below the tolerance",
    ),
    "batch/padding_frac": ("padding in the micro-batches", "below .5"),
    "batch/packing_ratio": (
        "tokens of all rows over those put through the model, where shared ones are one",
        "above 1",
    ),
    "batch/dropped_frac": (
        "groups that the objective left out of training; `reward` and the like count them",
        "below .9",
    ),
    "batch/micro_batches": ("micro-batches in the step", ""),
    "objective/*": (
        "numbers of the objective's own; rlpt: asked of the judge, known already, share not judged",
        "failed near 0",
    ),
    "run/epoch": ("passes over the data so far", ""),
    "run/skipped_steps": ("steps skipped for NaN or inf", "0"),
    "run/documents_without_position": ("documents drawn in which there was no place to think", ""),
    "eval/*": (
        "the same on held-out documents; see `rlpretrain eval`",
        "eval/gain_frozen rises, eval/no_think_loss does not",
    ),
}


def table() -> Any:
    """The metrics as a rich table: what `rlpretrain metrics` prints."""
    from rich.table import Table

    out = Table("metric", "meaning", "healthy", title="What rlpretrain logs")
    for name, (meaning, healthy) in METRICS.items():
        out.add_row(name, meaning, healthy)
    return out
