"""What thinking is worth, token by token: gains of target tokens after every thought, and after thoughts that
should not help.

What the report and `rlpretrain inspect` show. Numbers are log p(token | context, thought) - log p(token |
context) in nats, the first under the model shown, the second under a reference (the initial model where there
is one).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from rewards import leave_one_out
from rlpretrain.evaluation.evaluate import contrast
from rlpretrain.scoring.groups import micro_batches, score_batch
from rlpretrain.scoring.packing import Layout
from rlpretrain.scoring.references import Baseline
from rlpretrain.scoring.scorer import Scorer, score_function
from rlpretrain.types import Batch, Document
from rollout.types import Group, Thought

CONTROLS = {
    "empty": "an empty thought",
    "shuffled": "its own tokens in random order",
    "other": "a thought for another document",
}


@dataclass(frozen=True, slots=True)
class Row:
    """One thought."""

    thought: Thought
    gains: tuple[float, ...]  # of each target token, nats; empty where nothing was scored
    reward: float | None
    advantage: float | None

    @property
    def gain(self) -> float | None:
        """Of the whole target."""
        return sum(self.gains) if self.gains else None


@dataclass(frozen=True, slots=True)
class Place:
    """One position with its thoughts, the most advantageous first."""

    group: Group
    rows: list[Row]
    controls: dict[str, float] = field(default_factory=dict)  # mean gain of the target

    @property
    def gains(self) -> tuple[float, ...]:
        """Mean gain of each target token over the thoughts."""
        scored = [row.gains for row in self.rows if row.gains]
        return tuple(float(x) for x in np.mean(scored, axis=0)) if scored else ()


def places(
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
) -> list[Place]:
    """The groups as places. Without a `model` only what is stored on them is shown: rewards, no gains.

    Rewards are those stored, else those of `rewarded` (group id → one for each thought, NaN where it does not
    count), else gains.
    """
    gains: dict[str, np.ndarray] = {}
    controls: dict[str, dict[str, float]] = {g.id: {} for g in groups}
    wanted = [g for g in groups if g.position.target_ids]
    if model is not None and wanted:
        layout = Layout(token_budget, cut="force_close", pad_id=pad_id, no_think_ids=dict(no_think or {}))
        known = [
            documents[i] for i in dict.fromkeys(g.position.document_id for g in wanted) if i in documents
        ]
        base = token_logps(
            reference or model, [replace(g, thoughts=g.thoughts[:1]) for g in wanted], known, layout
        )[1]
        gains = {i: after - base[i] for i, after in token_logps(model, wanted, known, layout)[0].items()}
        kinds = [
            kind for kind in CONTROLS if kind != "other" or len({g.position.document_id for g in wanted}) > 1
        ]
        for kind in kinds:
            for i, after in token_logps(model, contrast(wanted, kind, seed), known, layout)[0].items():
                controls[i][kind] = float((after - base[i]).sum(-1).mean())
    out = []
    for group in groups:
        found = gains.get(group.id)
        rewards = group.rewards if group.rewards is not None else (rewarded or {}).get(group.id)
        if rewards is None:
            rewards = [np.nan] * len(group.thoughts) if found is None else found.sum(-1).tolist()
        advantages = [np.nan] * len(rewards)
        if len(rewards) > 1:
            advantages = leave_one_out(torch.tensor([list(rewards)], dtype=torch.float64))[0].tolist()
        rows = [
            Row(
                t,
                () if found is None else tuple(found[k].tolist()),
                None if r != r else r,
                None if r != r or a != a else a,
            )
            for k, (t, r, a) in enumerate(zip(group.thoughts, rewards, advantages, strict=True))
        ]
        rows.sort(key=lambda row: -(row.advantage if row.advantage is not None else -np.inf))
        out.append(Place(group, rows, controls[group.id]))
    return out


def rewards_now(
    objective: Any,
    model: nn.Module,
    baseline: Baseline,
    groups: Sequence[Group],
    documents: Sequence[Document],
    layout: Layout,
) -> dict[str, list[float]]:
    """{group id: what its thoughts earn under the model as it is, NaN where one does not count}, for rewards
    that are made of log-probabilities of the target.
    """
    micros = micro_batches(Batch(tuple(groups), tuple(documents)), layout)
    device = next(model.parameters()).device
    found = score_batch(
        score_function(Scorer(model)), micros, device, reference=baseline, objective=objective
    ).groups
    return {id_: scores.rewards.tolist() for id_, scores in found.items()}


def token_logps(
    model: nn.Module, groups: Sequence[Group], documents: Sequence[Document], layout: Layout
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """({group id: log-probs [G, T] after each thought}, {group id: log-probs [T] without one})."""
    batch = Batch(tuple(replace(g, rewards=None) for g in groups), tuple(documents))
    device = next(model.parameters()).device
    found = score_batch(score_function(Scorer(model)), micro_batches(batch, layout), device).groups
    after = {id_: scores.target_logps.double().numpy() for id_, scores in found.items()}
    return after, {id_: scores.baseline_logps.double().numpy() for id_, scores in found.items()}
