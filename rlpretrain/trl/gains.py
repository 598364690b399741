"""What a reward function of TRL found of its thoughts, and the metrics it logs of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from rewards.controls import repetition, target_leakage
from rlpretrain.scoring.groups import GroupScores
from rollout.types import FinishReason, Group


@dataclass(frozen=True, slots=True)
class ThoughtScores:
    """Rewards, and log-probs (nats) of whole targets, of each thought in the order of the groups."""

    rewards: np.ndarray
    """[thoughts] NaN where a thought does not count."""
    target_logps: np.ndarray
    """[thoughts] after the thought."""
    baseline_logps: np.ndarray
    """[thoughts] without a thought, by the baseline."""
    own_logps: np.ndarray
    """[thoughts] without a thought, by the trained model."""
    empty_gains: np.ndarray
    """[groups] the gain of a thought without content; no entries unless the baseline is frozen."""

    @classmethod
    def of(cls, groups: Sequence[GroupScores], empty: Sequence[GroupScores]) -> ThoughtScores:
        """The scores of groups, and of groups with one empty thought at the same positions."""
        return cls(
            rewards=np.concatenate([g.rewards.numpy() for g in groups]),
            target_logps=np.concatenate([g.joint_target.numpy() for g in groups]),
            baseline_logps=np.concatenate([g.joint_baseline.numpy() for g in groups]),
            own_logps=np.concatenate([g.joint_own.numpy() for g in groups]),
            empty_gains=np.array([float(e.joint_target[0] - e.joint_baseline[0]) for e in empty]),
        )

    def for_trl(self) -> list[float | None]:
        """The rewards as TRL takes them: None where a thought does not count."""
        return [None if np.isnan(reward) else float(reward) for reward in self.rewards]


def log_scores(
    groups: Sequence[Group],
    scores: ThoughtScores,
    log: Callable[[str, float], None],
    *,
    has_target: bool,
    frozen: bool,
) -> None:
    """Log `thought/*` of the groups, and `ig/*` and `baseline/self` where targets were scored (`has_target`).

    With `frozen` the gain is against the initial model and is logged as such too.
    """
    thoughts = [thought for group in groups for thought in group.thoughts]
    closed = [thought.finish_reason is FinishReason.CLOSE for thought in thoughts]
    counted = ~np.isnan(scores.rewards)
    log("thought/closed_frac", float(np.mean(closed)))
    log("thought/uncounted_frac", float((~counted).mean()))
    for group in groups[:1]:  # one thought is enough for a trend
        log("thought/leakage", target_leakage(group.thoughts[0].token_ids, group.position.target_ids))
        log("thought/repetition", repetition(group.thoughts[0].token_ids))
    if not has_target or not counted.any():
        return
    sizes = np.array([len(group.position.target_ids) for group in groups for _ in group.thoughts])
    gain = (scores.target_logps - scores.baseline_logps)[counted]
    own_gain = (scores.target_logps - scores.own_logps)[counted]
    log("ig/mean", float(gain.mean()))
    if frozen:
        log("ig/frozen", float(gain.mean()))
        log("ig/empty", float(scores.empty_gains.mean()))
    log("ig/std", float(gain.std()))
    log("ig/positive_frac", float((gain > 0).mean()))
    log("ig/per_token", float((gain / sizes[counted]).mean()))
    log("ig/self", float(own_gain.mean()))
    log("baseline/self", float(scores.own_logps[counted].mean()))
