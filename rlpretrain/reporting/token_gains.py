"""Information gain of every target token after every thought, and after thoughts that should not help.

A gain is log p(token | context, thought) - log p(token | context) in nats: the first under the reported
model, the second under a reference, which is the initial model if there is one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from rewards import leave_one_out
from rlpretrain.evaluation.contrast import contrast
from rlpretrain.scoring.groups import micro_batches, score_batch
from rlpretrain.scoring.packing import Layout
from rlpretrain.scoring.references import Baseline
from rlpretrain.scoring.scorer import Scorer, score_function
from rlpretrain.tracking.progress import Tick, no_tick
from rlpretrain.types import Batch, Document
from rollout.types import Group, Thought

CONTROLS = {
    "empty": "an empty thought",
    "shuffled": "its own tokens in random order",
    "other": "a thought for another document",
}
PASSES = 2 + len(CONTROLS)
"""Passes of the models over all positions in `score_positions`."""


@dataclass(frozen=True, slots=True)
class ScoredThought:
    """A thought with its gains, reward and advantage; None where there is no value."""

    thought: Thought
    gains: tuple[float, ...]
    """Of each target token, in nats; empty if nothing was scored."""
    reward: float | None
    advantage: float | None

    @property
    def gain(self) -> float | None:
        """Of the whole target."""
        return sum(self.gains) if self.gains else None


@dataclass(frozen=True, slots=True)
class ScoredPosition:
    """One position with its thoughts, the highest advantage first."""

    group: Group
    thoughts: list[ScoredThought]
    controls: dict[str, float] = field(default_factory=dict)
    """Mean gain of the target after each kind of control thought."""

    @property
    def gains(self) -> tuple[float, ...]:
        """Mean gain of each target token over the thoughts."""
        scored = [thought.gains for thought in self.thoughts if thought.gains]
        return tuple(float(gain) for gain in np.mean(scored, axis=0)) if scored else ()


@dataclass(frozen=True, slots=True)
class TokenLogps:
    """Log-probabilities of target tokens, by group id."""

    after: dict[str, np.ndarray]  # [G, T] after each thought
    without: dict[str, np.ndarray]  # [T] without a thought


def score_positions(
    groups: Sequence[Group],
    documents: Mapping[str, Document],
    *,
    model: nn.Module | None = None,
    reference: nn.Module | None = None,
    no_think: Mapping[str, tuple[int, ...]] | None = None,
    rewarded: Mapping[str, Sequence[float]] | None = None,
    pad_id: int = 0,
    seed: int = 0,
    token_budget: int = 16384,
    tick: Tick = no_tick,
) -> list[ScoredPosition]:
    """The groups with their gains; without a `model` only with their stored rewards.

    Rewards are the stored ones, else those of `rewarded` (by group id; NaN for a thought that does not
    count), else the gains. `tick` is called after each of PASSES passes.
    """
    gains: dict[str, np.ndarray] = {}
    controls: dict[str, dict[str, float]] = {group.id: {} for group in groups}
    targeted = [group for group in groups if group.position.target_ids]
    if model is not None and targeted:
        layout = Layout(token_budget, cut="force_close", pad_id=pad_id, no_think_ids=dict(no_think or {}))
        ids = dict.fromkeys(group.position.document_id for group in targeted)
        context = ([documents[document_id] for document_id in ids if document_id in documents], layout)
        first_thoughts = [replace(group, thoughts=group.thoughts[:1]) for group in targeted]
        base = token_logps(reference or model, first_thoughts, *context).without
        tick()
        scored = token_logps(model, targeted, *context).after
        tick()
        gains = {group_id: after - base[group_id] for group_id, after in scored.items()}
        for kind in CONTROLS:
            if kind == "other" and len(ids) < 2:
                continue
            scored = token_logps(model, contrast(targeted, kind, seed), *context).after
            for group_id, after in scored.items():
                controls[group_id][kind] = float((after - base[group_id]).sum(-1).mean())
            tick()
    positions = []
    for group in groups:
        group_gains = gains.get(group.id)
        rewards = group.rewards if group.rewards is not None else (rewarded or {}).get(group.id)
        if rewards is None:
            rewards = [np.nan] * len(group.thoughts) if group_gains is None else group_gains.sum(-1).tolist()
        thoughts = _scored_thoughts(group, group_gains, rewards)
        positions.append(ScoredPosition(group, thoughts, controls[group.id]))
    return positions


def _scored_thoughts(group: Group, gains: np.ndarray | None, rewards: Sequence[float]) -> list[ScoredThought]:
    advantages = [np.nan] * len(rewards)
    if len(rewards) > 1:
        advantages = leave_one_out(torch.tensor([list(rewards)], dtype=torch.float64))[0].tolist()
    scored = []
    for k, (thought, reward, advantage) in enumerate(zip(group.thoughts, rewards, advantages, strict=True)):
        thought_gains = () if gains is None else tuple(gains[k].tolist())
        has_reward = not np.isnan(reward)
        scored.append(
            ScoredThought(
                thought,
                thought_gains,
                reward if has_reward else None,
                advantage if has_reward and not np.isnan(advantage) else None,
            )
        )
    scored.sort(key=lambda row: -(row.advantage if row.advantage is not None else -np.inf))
    return scored


def rewards_now(
    objective: Any,
    model: nn.Module,
    baseline: Baseline,
    groups: Sequence[Group],
    documents: Sequence[Document],
    layout: Layout,
) -> dict[str, list[float]]:
    """{group id: rewards of its thoughts under the present model, NaN for one that does not count}.

    For objectives whose rewards are made of log-probabilities of the target, which are not stored.
    """
    micros = micro_batches(Batch(tuple(groups), tuple(documents)), layout)
    device = next(model.parameters()).device
    score = score_function(Scorer(model))
    scored = score_batch(score, micros, device, reference=baseline, objective=objective).groups
    return {group_id: scores.rewards.tolist() for group_id, scores in scored.items()}


def token_logps(
    model: nn.Module, groups: Sequence[Group], documents: Sequence[Document], layout: Layout
) -> TokenLogps:
    """Log-probabilities of each group's target tokens, after its thoughts and without one."""
    batch = Batch(tuple(replace(group, rewards=None) for group in groups), tuple(documents))
    device = next(model.parameters()).device
    scored = score_batch(score_function(Scorer(model)), micro_batches(batch, layout), device).groups
    return TokenLogps(
        {group_id: scores.target_logps.double().numpy() for group_id, scores in scored.items()},
        {group_id: scores.baseline_logps.double().numpy() for group_id, scores in scored.items()},
    )
