"""The numbers of a corpus with thoughts, counted from its rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Summary:
    """Counts over all rows."""

    rows: int = 0
    rows_with_thoughts: int = 0
    rows_without_places: int = 0
    """Rows in which there was no place to think: too long, or without the marker or a place by entropy."""
    places: int = 0
    sampled: int = 0
    """Thoughts that were sampled: those that are kept and those of `dropped`."""
    kept: int = 0
    unfinished_kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    """By the reasons of `thought_texts.REASONS`."""
    document_tokens: int = 0
    """Of the source texts."""
    thought_tokens: int = 0
    """Of the kept thoughts, with their tags."""
    gain_sum: float = 0.0
    leak_sum: float = 0.0
    gains: int = 0
    """Kept thoughts that have a gain."""
    leaks: int = 0
    """Kept thoughts whose leak was measured."""

    @classmethod
    def of(cls, rows: Iterable[Mapping[str, Any]]) -> Summary:
        """The summary of rows as they are in the file."""
        summary = cls()
        for row in rows:
            summary._add(row)
        return summary

    def _add(self, row: Mapping[str, Any]) -> None:
        thoughts = row["thoughts"]
        self.rows += 1
        self.rows_with_thoughts += bool(thoughts)
        self.rows_without_places += not row["places"]
        self.places += row["places"]
        self.sampled += row["sampled"]
        self.kept += len(thoughts)
        self.unfinished_kept += sum(thought["finish_reason"] != "close" for thought in thoughts)
        for reason, number in row["dropped"].items():
            self.dropped[reason] = self.dropped.get(reason, 0) + number
        self.document_tokens += row["document_tokens"]
        self.thought_tokens += row["thought_tokens"]
        gains = [thought["gain"] for thought in thoughts if thought.get("gain") is not None]
        leaks = [thought["leak"] for thought in thoughts if "leak" in thought]
        self.gain_sum, self.gains = self.gain_sum + sum(gains), self.gains + len(gains)
        self.leak_sum, self.leaks = self.leak_sum + sum(leaks), self.leaks + len(leaks)

    @property
    def thought_share(self) -> float:
        """The share of all tokens that are of thoughts: what they displace of documents at equal tokens."""
        return self.thought_tokens / max(1, self.thought_tokens + self.document_tokens)
