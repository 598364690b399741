"""The numbers of an evaluation, per position, with their meanings, means and intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rlpretrain.evaluation.intervals import interval, row_of
from rlpretrain.types import Document
from rollout.types import Group

MEANING = {
    "think_sampled": "share of sampled thoughts after which the likeliest continuation is the true one",
    "think_greedy": "the same after the greedy thought",
    "direct": "the same without a thought, as a share of positions",
    "gain": "log p(target | context, thought) - log p(target | context) in nats, against the model itself",
    "gain_frozen": "the same against the frozen model without a thought",
    "direct_gain": "log p(target | context) minus the frozen model's: what training changed without thoughts",
    "empty": "gain_frozen of a thought without content",
    "shuffled": "gain_frozen of the thought's own tokens in random order",
    "other": "gain_frozen of a thought made for another document",
    "no_think_loss": "next-token loss on the documents, without thoughts (nats per token)",
    "answer_loss": "the same on the answers of documents that are prompts with answers; not where it thinks",
    "no_think_change": "no_think_loss minus that of the frozen model",
    "unclosed": "share of sampled thoughts that did not close themselves",
    "length": "tokens per thought",
    "reward": "reward of thoughts that the objective can judge without log-probabilities",
    "asked": "reward of the groups that these groups asked for (PretrainZero's predictors: their accuracy)",
    "not_finite": "share of positions with a log-probability of NaN or infinity; no mean includes them",
}
"""Every number of an evaluation; `not_finite` is there only if it is not 0."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Numbers per position (`values`), the positions' documents, and the loss of each of these.

    Where positions share a document, only the first counts its `tokens`, the others 0.
    """

    values: dict[str, np.ndarray]
    documents: list[Document]
    losses: np.ndarray
    tokens: np.ndarray
    groups: list[Group]
    frozen_losses: np.ndarray | None = None
    """As `losses`, of the frozen model if that is another."""

    @staticmethod
    def join(parts: Sequence[Evaluation]) -> Evaluation:
        """The evaluations of several ranks as one."""
        if len(parts) == 1:
            return parts[0]
        names = dict.fromkeys(name for part in parts for name in part.values)

        def column(part: Evaluation, name: str) -> np.ndarray:
            return part.values.get(name, np.full(len(part.documents), np.nan))

        return Evaluation(
            values={name: np.concatenate([column(part, name) for part in parts]) for name in names},
            documents=[document for part in parts for document in part.documents],
            losses=np.concatenate([part.losses for part in parts]),
            tokens=np.concatenate([part.tokens for part in parts]),
            groups=[group for part in parts for group in part.groups],
            frozen_losses=_concatenated([part.frozen_losses for part in parts]),
        )

    def where(self, keep: Sequence[bool]) -> Evaluation:
        """Only some of the positions, and their documents."""
        mask = np.asarray(keep, bool)
        return Evaluation(
            values={name: array[mask] for name, array in self.values.items()},
            documents=[document for document, kept in zip(self.documents, mask, strict=True) if kept],
            losses=self.losses[mask],
            tokens=self.tokens[mask],
            groups=[group for group, kept in zip(self.groups, mask, strict=bool(self.groups)) if kept],
            frozen_losses=None if self.frozen_losses is None else self.frozen_losses[mask],
        )

    def by_stream(self) -> dict[str, Evaluation]:
        """The evaluation of each named source that documents are from, with the numbers that it has."""
        streams = [document.stream for document in self.documents]
        parts = {name: self.where([s == name for s in streams]) for name in sorted(set(streams) - {""})}
        return {
            name: replace(part, values={n: v for n, v in part.values.items() if not np.isnan(v).all()})
            for name, part in parts.items()
        }

    def columns(self) -> dict[str, Any]:
        """Every number at each position, the `tokens` that weight its loss, and its source row: for JSON."""
        arrays = self.values | {"no_think_loss": self.losses, "tokens": self.tokens}
        return {name: array.tolist() for name, array in arrays.items()} | {"rows": self.rows}

    def summary(self, seed: int = 0) -> dict[str, float | list[float]]:
        """Mean of every number, and its 95% interval under the same name with `_ci`."""
        means: dict[str, float | list[float]] = {}
        for name, values in self.values.items():
            means[name], means[f"{name}_ci"] = interval(values, rows=self.rows, seed=seed)
        loss, loss_interval = interval(self.losses, self.tokens, rows=self.rows, seed=seed)
        means |= {"no_think_loss": loss, "no_think_loss_ci": loss_interval}
        if self.frozen_losses is not None:
            change = interval(self.losses - self.frozen_losses, self.tokens, rows=self.rows, seed=seed)
            means |= {"no_think_change": change[0], "no_think_change_ci": change[1]}
        if share := self.not_finite:
            means["not_finite"] = share
        return means

    @property
    def rows(self) -> list[str]:
        """The source row of each position."""
        return [row_of(document.id) for document in self.documents]

    def meta(self, column: str) -> list[str]:
        """A column that the documents carry (`data.meta_columns`), as text; "None" where it is missing."""
        return [str((document.meta or {}).get(column)) for document in self.documents]

    @property
    def not_finite(self) -> float:
        """Share of positions at which a log-probability is NaN or infinite. No mean includes these."""
        scored = [self.values[name] for name in ("gain", "gain_frozen") if name in self.values]
        finite = np.logical_and.reduce(np.isfinite([self.losses, *scored]))
        return float(1 - finite.mean()) if finite.size else 0.0


def _concatenated(parts: Sequence[np.ndarray | None]) -> np.ndarray | None:
    """The arrays as one; None if one of them is missing."""
    arrays = [part for part in parts if part is not None]
    return np.concatenate(arrays) if len(arrays) == len(parts) else None


def by_meta(evaluation: Evaluation, column: str) -> dict[str, Evaluation]:
    """The evaluation split by a column that documents carry, for instance their depth."""
    values = evaluation.meta(column)
    return {
        value: evaluation.where([of_document == value for of_document in values])
        for value in sorted(set(values))
    }
