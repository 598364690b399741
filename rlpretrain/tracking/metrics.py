"""Every metric of a run: its name, meaning and healthy range.

TRL's names where TRL has one; ours are ig/*, thought/*, baseline/*, ntp/*, reference/*, reader/*,
verified/*, preference/*, feedback/*, targets/*, designer/*, perf/*, run/*.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Metric:
    """What a metric means, and what it does in a healthy run."""

    meaning: str
    healthy: str = ""


METRICS: dict[str, Metric] = {
    "loss": Metric("total loss of the step", "falls slowly, without jumps"),
    "policy_loss": Metric(
        "clipped surrogate; 0 on-policy with leave-one-out, up to length weights", "near 0"
    ),
    "reward": Metric("mean reward of the thoughts that count", "rises"),
    "reward_std": Metric("mean standard deviation of rewards within a group", "above 0"),
    "frac_reward_zero_std": Metric("share of groups with equal rewards; they teach nothing", "below .9"),
    "ig/mean": Metric("information gain against the baseline, in nats", "rises above 0"),
    "ig/std": Metric("standard deviation of the gain over all thoughts", "finite"),
    "ig/positive_frac": Metric("share of thoughts with a gain above 0", "rises above .5"),
    "ig/per_token": Metric("gain per target token", "rises above 0"),
    "ig/self": Metric(
        "gain against the current model without a thought; rises too if that model gets worse",
        "near ig/frozen",
    ),
    "ig/frozen": Metric("gain against the initial model without a thought", "rises above 0"),
    "ig/empty": Metric("ig/frozen of an empty thought: what the tags alone gain", "well below ig/frozen"),
    "thought/closed_frac": Metric("share of thoughts that closed themselves", "above .9"),
    "thought/eos_frac": Metric("share of thoughts that ended the document instead", "near 0"),
    "thought/uncounted_frac": Metric("share of thoughts that do not count (cut off, aborted)", "below .1"),
    "thought/leakage": Metric("overlap of thought and target n-grams", "no sudden rise"),
    "thought/repetition": Metric("share of 4-grams repeated within a thought", "below .3"),
    "completions/mean_length": Metric("tokens per thought", "no drift to 0 or to the limit"),
    "completions/max_length": Metric("tokens of the longest thought", "below the limit"),
    "completions/clipped_ratio": Metric("share of thoughts cut off at the limit", "below .1"),
    "baseline/logp": Metric("mean log p(target) of the baseline", "steady"),
    "baseline/self": Metric("mean log p(target) of the current model without a thought", "not falling"),
    "ntp/loss": Metric("next-token loss of the trunk, in nats per token", "not above its start"),
    "ntp/trained_loss": Metric(
        "the same where the objective's weight is above 0 (sft_mixed: without prompts)", "falls"
    ),
    "ntp/weight_mean": Metric(
        "mean weight of the next-token loss, where the objective weighs tokens", "near 1: it scales the step"
    ),
    "ntp/weight_ess": Metric(
        "effective sample size of these weights, (Σw)² / (n Σw²), as a share of the tokens", "above .1"
    ),
    "preference/good_frac": Metric(
        "share of the segments drawn that are good, or of documents that `filter` keeps", "not 0 and not 1"
    ),
    "ntp/soft_frac": Metric(
        "share of document tokens with soft targets, for objectives that give some", "1, or 0 after `until`"
    ),
    "feedback/loss": Metric(
        "`v_pretrain`: loss on the labelled documents of the step's gradient, in nats per answer token",
        "falls",
    ),
    "feedback/held_out_loss": Metric(
        "the same on labelled documents that are never used", "near feedback/loss: above it, it is overfit"
    ),
    "feedback/gradient_norm": Metric("norm of the feedback's gradient, of `subset` alone", "finite"),
    "feedback/value": Metric(
        "V: product of the gradients of the feedback's loss and of the loss on the targets",
        "above feedback/value_ntp",
    ),
    "feedback/value_ntp": Metric("the same for the next-token loss", ""),
    "feedback/cosine": Metric(
        "cosine of the two gradients in the step that was taken; with `subset: all` only", "above 0"
    ),
    "feedback/shift": Metric(
        "length of the shift over that of the weights it moves, as float32 has it", "`shift`"
    ),
    "feedback/skipped_frac": Metric("1 where the feedback's gradient was not finite", "0"),
    "targets/alpha": Metric("mean α of the targets", "not at its largest all the time"),
    "targets/off_mass": Metric("mean probability of the targets off the document's own token", "below α"),
    "targets/entropy": Metric("mean entropy of the targets, in nats", "above 0"),
    "targets/open_frac": Metric("share of tokens with a gate above .95; 1 without a designer", "below 1"),
    "designer/gradient_norm": Metric("gradient norm of the designer before it is clipped to 1", "no jumps"),
    "reference/cached_frac": Metric(
        "share of the reference's log-probs that came from its cache", "1 from the second epoch on"
    ),
    "reference/kl": Metric(
        "mean log-ratio of a thought under policy and reference, in nats: an estimate of the KL divergence",
        "0 at the start of a run from the reference, then bounded",
    ),
    "router/balance": Metric(
        "how unevenly a mixture uses its experts, with `loss.router_coef`: at least the experts of a token",
        "near that number, and does not rise",
    ),
    "reader/loss": Metric("mean -log p(target | context, thought)", "falls"),
    "sampling/*": Metric(
        "importance ratios and log-prob differences of sampler and trainer, raw and truncated", "ratio near 1"
    ),
    "clip_ratio/region_mean": Metric("share of thought tokens whose ratio was clipped", "below .2"),
    "grad_norm": Metric("gradient norm before clipping", "no jumps"),
    "learning_rate": Metric("learning rate of the step"),
    "num_input_tokens": Metric("document tokens so far; papers report these"),
    "num_tokens": Metric("tokens that models have read so far: sampled, scored and trained ones"),
    "num_flops": Metric(
        "operations of matrix products and attention so far: 6 N per trained token, 2 N per token only read"
    ),
    "step_time": Metric("seconds per step", "steady"),
    "perf/rollout_s": Metric("seconds of the step for sampling thoughts"),
    "perf/train_s": Metric("seconds of the step for scoring and updating"),
    "perf/sync_s": Metric("seconds of the step for giving weights to the engine", "near 0 if embedded"),
    "perf/tokens_per_s": Metric(
        "tokens trained on (document, thoughts, targets) over the seconds of the step, all ranks", "steady"
    ),
    "perf/flops_per_s": Metric("operations of the step over its seconds, all ranks and engines", "steady"),
    "perf/mfu": Metric(
        "operations of scoring and updating over perf/train_s and the peak of the ranks' GPUs in bf16",
        "steady",
    ),
    "perf/step_mfu": Metric(
        "the same of the whole step: sampling in the ranks' own processes included", "steady"
    ),
    "sample/staleness_mean": Metric(
        "steps between sampling a thought and training on it", "0 if synchronous, else up to max_staleness"
    ),
    "sample/staleness_max": Metric("the same for the oldest thought", "at most max_staleness"),
    "sample/updated_frac": Metric(
        "share of thoughts during which new weights arrived, where some did (engine.updates)", "any"
    ),
    "sample/token_staleness_mean": Metric(
        "steps between sampling an id and training on it, where some thoughts have such updates",
        "below sample/staleness_mean",
    ),
    "perf/weight_sync_mib": Metric(
        "MiB of weights that one server is sent by a sync", "small with engine.transfer: changes"
    ),
    "perf/weight_sync_*": Metric(
        "parts of the sync, if engines have their own weights: gather, write, drain, load",
        "small beside the step",
    ),
    "perf/probe_s": Metric(
        "seconds of the probe after a sync, if the engine has its own weights", "below 2% of the step"
    ),
    "sampling/probe_difference": Metric(
        "largest difference between engine and trainer on the probe, in nats", "below the tolerance"
    ),
    "batch/padding_frac": Metric("share of padding in the micro-batches", "below .5"),
    "batch/packing_ratio": Metric(
        "tokens of all rows over tokens that the model read; shared tokens are read once", "above 1"
    ),
    "batch/dropped_frac": Metric(
        "share of groups that the objective left out of training; `reward` etc. include them", "below .9"
    ),
    "batch/micro_batches": Metric("micro-batches in the step"),
    "objective/*": Metric(
        "the objective's own metrics; rlpt, sip: judge requests, cached verdicts, share not judged; sip: "
        "scores and shares of the kinds of candidates, ties, correlation of length and score",
        "failed near 0",
    ),
    "verified/verified": Metric(
        "objective verified: share of thoughts whose answer and every needed step are right", "rises"
    ),
    "verified/answer_right": Metric("the same for the answer alone", "rises with verified/verified"),
    "verified/lucky": Metric("share of thoughts with a right answer after a wrong trace", "falls"),
    "verified/process": Metric("mean share of the needed steps that a trace has right", "rises"),
    "verified/malformed": Metric("clauses of a trace that the verifier cannot read, per thought", "near 0"),
    "verified/truncated": Metric(
        "share of thoughts without a close tag, or with an answer without its end; they count as wrong",
        "below .1",
    ),
    "run/epoch": Metric("passes over the data so far"),
    "source/*": Metric(
        "of each source of `data.sources`: documents and tokens drawn so far, passes, present weight, "
        "next-token loss of the step",
        "tokens follow the weights",
    ),
    "run/skipped_steps": Metric("steps skipped for NaN or infinity", "0"),
    "run/documents_without_position": Metric(
        "documents so far that `prepare` dropped or that had no position"
    ),
    "eval/tasks/*": Metric(
        "lm-eval's tasks: direct, after a thought, and the same of the untouched base; thoughts/* describe "
        "the thoughts",
        "direct is not below base_direct",
    ),
    "eval_averaged/*": Metric(
        "the same numbers as eval/* for the average of the weights (`average`)",
        "eval_averaged/gain_frozen above eval/gain_frozen",
    ),
    "eval/*": Metric(
        "numbers on held-out documents; `rlpretrain eval` explains them",
        "eval/gain_frozen rises, eval/no_think_loss does not",
    ),
}


def table() -> Any:
    """The metrics as a rich table, printed by `rlpretrain metrics`."""
    from rich.table import Table

    metrics = Table("metric", "meaning", "healthy", title="What rlpretrain logs")
    for name, metric in METRICS.items():
        metrics.add_row(name, metric.meaning, metric.healthy)
    return metrics
