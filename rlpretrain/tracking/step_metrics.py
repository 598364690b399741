"""The metrics of one step: collected over its micro-batches, averaged over all ranks."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch

from rewards.controls import repetition, target_leakage
from rlpretrain.ranks import Ranks
from rlpretrain.types import MicroBatch, Scores
from rollout.types import Group, Thought


def staleness(groups: Sequence[Group], version: int) -> dict[str, float]:
    """How many steps ago the thoughts of a batch were sampled."""
    thoughts = [thought for group in groups for thought in group.thoughts if not thought.given]
    ages = [version - thought.policy_version for thought in thoughts]
    if not ages:
        return {}
    found = {"sample/staleness_mean": sum(ages) / len(ages), "sample/staleness_max": max(ages)}
    if any(thought.updates for thought in thoughts):
        tokens = [age for thought in thoughts for age in _ages(thought, version)]
        found["sample/updated_frac"] = sum(bool(thought.updates) for thought in thoughts) / len(thoughts)
        found["sample/token_staleness_mean"] = sum(tokens) / len(tokens)
    return found


def _ages(thought: Thought, version: int) -> Iterator[int]:
    """How many steps ago each id was sampled."""
    starts = [(0, thought.policy_version), *thought.updates, (len(thought.token_ids), 0)]
    for (start, drawn_at), (end, _) in pairwise(starts):
        yield from [version - drawn_at] * (end - start)


class StepMetrics:
    """Sums over the micro-batches of one step, averaged over all ranks at its end."""

    def __init__(self) -> None:
        self.sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        self.totals: dict[str, float] = defaultdict(float)
        self.longest = 0.0
        self.rewards: dict[tuple[str, int], float] = {}  # (group id, index of the thought) to reward

    def total(self, name: str, value: Any) -> None:
        """Add to a metric that is summed: a loss, whose terms are divided by global counts already."""
        self.totals[name] += float(value)

    def add(self, name: str, values: Any, weight: float | None = None) -> None:
        """Add a tensor's elements, or a mean with its weight; values that are not finite are left out."""
        if isinstance(values, torch.Tensor):
            values = values[torch.isfinite(values)].double()
            total, n = float(values.sum()), float(values.numel())
        else:
            n = (1.0 if weight is None else weight) * math.isfinite(values)
            total = float(values) * n if n else 0.0
        self.sums[name][0] += total
        self.sums[name][1] += n

    @torch.no_grad()
    def observe(
        self, micro: MicroBatch, scores: Scores, reward: torch.Tensor, self_logps: torch.Tensor
    ) -> None:
        """Add one micro-batch; `self_logps` [B, T] are the current model's without a thought."""
        padding = 1 - float(micro.attention_mask.float().mean())
        self.add("batch/padding_frac", padding, micro.attention_mask.numel())
        self.add("batch/packing_ratio", micro.row_tokens / micro.input_ids.numel(), micro.input_ids.numel())
        if scores.trunk_logps.numel():
            self.add("ntp/loss", -scores.trunk_logps.detach())
            self._add_source_losses(micro, scores)
        if not micro.groups:
            return
        counted = scores.counted
        if scores.target_mask.any():
            self._add_gains(scores, self_logps)
        if scores.thought_reference is not None:
            log_ratio = (scores.thought_logps.detach() - scores.thought_reference).sum(-1)
            self.add("reference/kl", log_ratio[counted & ~micro.given])
        self.add("reward", reward[counted])
        parts = zip(reward, counted, micro.groups, strict=True)
        deviations = torch.stack([_deviation(r[c], len(group.thoughts)) for r, c, group in parts])
        self.add("reward_std", deviations)
        self.add("frac_reward_zero_std", (deviations[torch.isfinite(deviations)] == 0).float())
        self.add("thought/uncounted_frac", (~counted).float())
        for group, first, rewards in zip(micro.groups, micro.offsets, reward.tolist(), strict=True):
            for k in range(len(group.thoughts)):
                self.rewards[group.id, first + k] = rewards[k]
            self._add_thoughts(group)

    def add_weights(self, weights: torch.Tensor, logps: torch.Tensor) -> None:
        """Add the weights [M] of the next-token loss in a micro-batch, and log p [M] where they are not 0."""
        self.add("ntp/trained_loss", -logps[weights > 0])
        self.add("ntp/weight_mean", weights)
        self.add("ntp/weight_square", weights.double() ** 2)

    def observe_dropped(self, group: Group, counted: Sequence[bool], rewards: Sequence[float]) -> None:
        """Add a group that is left out of training; the metrics of thoughts and rewards include it."""
        self._add_thoughts(group)
        self.add("thought/uncounted_frac", 1.0 - torch.tensor(counted, dtype=torch.float64))
        known = torch.tensor([r for r in rewards if math.isfinite(r)], dtype=torch.float64)
        self.add("reward", known)
        if len(known):
            self.add("reward_std", known.std(correction=0))
            self.add("frac_reward_zero_std", float(known.max() == known.min()))

    def _add_source_losses(self, micro: MicroBatch, scores: Scores) -> None:
        """The next-token loss of the documents of each named source."""
        if not any(document.stream for document in micro.documents):
            return
        sizes = [len(document.token_ids) - 1 for document in micro.documents]
        for document, logps in zip(micro.documents, scores.trunk_logps.detach().split(sizes), strict=True):
            if document.stream:
                self.add(f"source/{document.stream}/loss", -logps)

    def _add_thoughts(self, group: Group) -> None:
        sampled = [thought for thought in group.thoughts if not thought.given]
        for thought in sampled:
            length, reason = len(thought.token_ids), thought.finish_reason
            self.longest = max(self.longest, length)
            self.add("completions/mean_length", length)
            self.add("completions/clipped_ratio", reason == "length")
            self.add("thought/closed_frac", reason == "close")
            self.add("thought/eos_frac", reason == "eos")
        for first in sampled[:1]:  # one per group is enough for a trend
            self.add("thought/leakage", target_leakage(first.token_ids, group.position.target_ids))
            self.add("thought/repetition", repetition(first.token_ids))

    def _add_gains(self, scores: Scores, self_logps: torch.Tensor) -> None:
        counted, mask = scores.counted, scores.target_mask
        target = (scores.target_logps.detach() * mask[:, None]).sum(-1)
        base, own = (scores.baseline_logps * mask).sum(-1), (self_logps * mask).sum(-1)
        gain = (target - base[:, None])[counted]
        lengths = mask.sum(-1, keepdim=True).expand_as(counted)[counted]
        self.add("ig/mean", gain)
        self.add("ig/square", gain**2)
        self.add("ig/positive_frac", (gain > 0).float())
        self.add("ig/per_token", gain / lengths)
        self.add("ig/self", (target - own[:, None])[counted])
        self.add("reader/loss", -target[counted])
        self.add("baseline/logp", base)
        self.add("baseline/self", own)

    def means(self, ranks: Ranks) -> dict[str, float]:
        """Every metric's mean over all ranks. All ranks call it."""
        names = sorted(set().union(*ranks.gather(sorted(self.sums))))
        sums = ranks.sum([part for name in names for part in self.sums[name]])
        pairs = zip(names, sums[::2], sums[1::2], strict=True)
        means = {name: total / weight for name, total, weight in pairs if weight}
        if "feedback/slope" in means:
            slope = means.pop("feedback/slope")
            if means.get("grad_norm"):
                means["feedback/cosine"] = slope / means["grad_norm"]
        summed = sorted(set().union(*ranks.gather(sorted(self.totals))))
        means |= dict(zip(summed, ranks.sum([self.totals[name] for name in summed]), strict=True))
        if "ig/square" in means:
            means["ig/std"] = max(0.0, means.pop("ig/square") - means["ig/mean"] ** 2) ** 0.5
        if "ntp/weight_square" in means:
            square = means.pop("ntp/weight_square")
            means["ntp/weight_ess"] = means["ntp/weight_mean"] ** 2 / square if square else 0.0
        if "completions/mean_length" in means:
            means["completions/max_length"] = ranks.max([self.longest])[0]
        return means


def _deviation(rewards: torch.Tensor, thoughts: int) -> torch.Tensor:
    """Standard deviation of a group's counted rewards; NaN if none counts, or the group has one thought."""
    is_known = rewards.numel() and thoughts > 1
    return rewards.std(correction=0) if is_known else rewards.new_tensor(torch.nan)
