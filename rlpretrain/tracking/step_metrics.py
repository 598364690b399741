"""The numbers of one step: gathered over its micro-batches, averaged over all ranks."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch

from rewards.controls import repetition, target_leakage
from rlpretrain.ranks import Ranks
from rlpretrain.types import MicroBatch, Scores
from rollout.types import Group


def staleness(groups: Sequence[Group], version: int) -> dict[str, float]:
    """How many steps ago the thoughts of a batch were sampled."""
    ages = [version - t.policy_version for g in groups for t in g.thoughts]
    return {"sample/staleness_mean": sum(ages) / len(ages), "sample/staleness_max": max(ages)} if ages else {}


class StepMetrics:
    """Sums over the micro-batches of one step, averaged over all ranks at its end."""

    def __init__(self) -> None:
        self.sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        self.totals: dict[str, float] = defaultdict(float)
        self.longest = 0.0
        self.rewards: dict[tuple[str, int], float] = {}  # of each thought, by its group and place there

    def total(self, name: str, value: Any) -> None:
        """Add to a number that is summed, not averaged (the loss, whose terms are divided by global counts
        already).
        """
        self.totals[name] += float(value)

    def add(self, name: str, values: Any, weight: float | None = None) -> None:
        """Add a tensor's elements, or a mean with its weight; what is not finite is not added."""
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
        """What one micro-batch shows; `self_logps` [B, T] are the current model's without a thought."""
        self.add(
            "batch/padding_frac", 1 - float(micro.attention_mask.float().mean()), micro.attention_mask.numel()
        )
        self.add("batch/packing_ratio", micro.row_tokens / micro.input_ids.numel(), micro.input_ids.numel())
        if scores.trunk_logps.numel():
            self.add("ntp/loss", -scores.trunk_logps.detach())
        if not micro.groups:
            return
        counted = scores.counted
        if scores.target_mask.any():
            self._gains(scores, self_logps)
        self.add("reward", reward[counted])
        spread = torch.stack(
            [
                r[c].std(correction=0) if c.any() else r.new_tensor(torch.nan)
                for r, c in zip(reward, counted, strict=True)
            ]
        )
        self.add("reward_std", spread)
        self.add("frac_reward_zero_std", (spread[torch.isfinite(spread)] == 0).float())
        self.add("thought/uncounted_frac", (~counted).float())
        for group, first, given in zip(micro.groups, micro.offsets, reward.tolist(), strict=True):
            self.rewards.update({(group.id, first + k): given[k] for k in range(len(group.thoughts))})
            self._thoughts(group)

    def observe_dropped(self, group: Group, counted: Sequence[bool], rewards: Sequence[float]) -> None:
        """A group that is left out of training: it counts in what is said of thoughts and their rewards
        all the same.
        """
        self._thoughts(group)
        self.add("thought/uncounted_frac", 1.0 - torch.tensor(counted, dtype=torch.float64))
        known = torch.tensor([r for r in rewards if math.isfinite(r)], dtype=torch.float64)
        self.add("reward", known)
        if len(known):
            self.add("reward_std", known.std(correction=0))
            self.add("frac_reward_zero_std", float(known.max() == known.min()))

    def _thoughts(self, group: Group) -> None:
        for t in group.thoughts:
            n = len(t.token_ids)
            self.longest = max(self.longest, n)
            self.add("completions/mean_length", n)
            self.add("completions/clipped_ratio", t.finish_reason == "length")
            self.add("thought/closed_frac", t.finish_reason == "close")
            self.add("thought/eos_frac", t.finish_reason == "eos")
        t = group.thoughts[0]  # one a group is enough for a trend
        self.add("thought/leakage", target_leakage(t.token_ids, group.position.target_ids))
        self.add("thought/repetition", repetition(t.token_ids))

    def _gains(self, scores: Scores, self_logps: torch.Tensor) -> None:
        counted, mask = scores.counted, scores.target_mask
        target = (scores.target_logps.detach() * mask[:, None]).sum(-1)
        base, own = (scores.baseline_logps * mask).sum(-1), (self_logps * mask).sum(-1)
        gain = (target - base[:, None])[counted]
        self.add("ig/mean", gain)
        self.add("ig/square", gain**2)
        self.add("ig/positive_frac", (gain > 0).float())
        self.add(
            "ig/per_token",
            (target - base[:, None])[counted] / mask.sum(-1, keepdim=True).expand_as(counted)[counted],
        )
        self.add("ig/self", (target - own[:, None])[counted])
        self.add("reader/loss", -target[counted])
        self.add("baseline/logp", base)
        self.add("baseline/self", own)

    def means(self, ranks: Ranks) -> dict[str, float]:
        """Name → mean over all ranks. Every rank must call it with the same names."""
        names = sorted(set().union(*ranks.gather(sorted(self.sums))))
        flat = ranks.sum([x for n in names for x in self.sums[n]])
        out = {n: flat[2 * i] / flat[2 * i + 1] for i, n in enumerate(names) if flat[2 * i + 1]}
        totals = sorted(set().union(*ranks.gather(sorted(self.totals))))
        out |= dict(zip(totals, ranks.sum([self.totals[n] for n in totals]), strict=True))
        if "ig/square" in out:
            out["ig/std"] = max(0.0, out.pop("ig/square") - out["ig/mean"] ** 2) ** 0.5
        if "completions/mean_length" in out:
            out["completions/max_length"] = ranks.max([self.longest])[0]
        return out
