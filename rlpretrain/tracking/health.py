"""Warnings about a run, each with the setting to change; console, report and TRL use the same rules.

A rule looks at one or two metrics: their mean at the start of the run, now, and at best so far. It warns
once, when it first holds. It reads metrics.jsonl alone, so a finished run gets the warnings of a live one.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

FIELDS: Mapping[str, str] = {
    "unclosed": "sampling.cut: penalise",
    "limit": "sampling.max_thought_tokens",
    "thoughts": "sampling.thoughts",
    "temperature": "sampling.temperature",
    "positions": "objective.positions",
    "next_token": "loss.ntp_coef",
    "rate": "optim.lr",
    "staleness": "engine.max_staleness",
}
"""The settings that a rule can advise to change, by their names in the configuration of a run."""
TRL_FIELDS: Mapping[str, str] = {
    "unclosed": "cut='penalise'",
    "limit": "max_completion_length",
    "thoughts": "num_generations",
    "temperature": "temperature",
    "positions": "positions",
    "next_token": "ntp_coef",
    "rate": "learning_rate",
    "staleness": "max_staleness",
}
"""The same settings by their names in TRL and in the arguments of the reward function."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A warning, and the step at which its rule first held."""

    rule: str
    step: int
    text: str

    def __str__(self) -> str:
        return self.text


@dataclass(slots=True)
class Course:
    """A metric over a run: means over `size` values, at the start, now, and the highest so far."""

    size: int
    count: int = 0
    start: float = math.nan
    best: float = -math.inf
    recent: deque[float] = field(default_factory=deque)
    squared_jumps: float = 0.0
    """Sum of the squared differences between values that follow each other."""

    def add(self, value: float) -> None:
        """Add the next finite value."""
        self.count += 1
        if self.recent:
            self.squared_jumps += (value - self.recent[-1]) ** 2
        self.recent.append(value)
        if len(self.recent) > self.size:
            self.recent.popleft()
        if self.count == self.size:
            self.start = self.now
        if self.count >= self.size:
            self.best = max(self.best, self.now)

    @property
    def now(self) -> float:
        """Mean of the last `size` values."""
        return sum(self.recent) / len(self.recent)

    @property
    def noise(self) -> float:
        """Four standard errors of the difference between two means.

        They follow from values next to each other, so that a slow change is not taken for noise.
        """
        if self.count < 2:
            return 0.0
        return 4 * math.sqrt(self.squared_jumps / (self.count - 1) / self.size)


@dataclass(frozen=True, slots=True)
class Rule:
    """Warns if `holds` is true of the courses of `metrics`, with means over `size` values."""

    name: str
    metrics: tuple[str, ...]
    holds: Callable[..., bool]
    text: str
    size: int = 10
    after: int = 0
    """Values that must have been seen."""


def _above(limit: float) -> Callable[[Course], bool]:
    """The mean is above the limit."""
    return lambda course: course.now > limit


def _between(low: float, high: float) -> Callable[[Course], bool]:
    """The mean is above `low` and below `high`."""
    return lambda course: low < course.now < high


def _rose_by(amount: float) -> Callable[[Course], bool]:
    """The mean is above its start by more than the amount, and more than noise explains."""
    return lambda course: course.now > course.start + max(amount, course.noise)


def _gain_falls(gain: Course) -> bool:
    """Below its best by over half of it and over .2 nats, or below both 0 and its start by over .2 nats.

    Both by more than noise explains.
    """
    least = max(0.2, gain.noise)
    return gain.now < gain.best - max(least, 0.5 * abs(gain.best)) or gain.now < min(0.0, gain.start) - least


def _only_tags_gain(gain: Course, empty: Course) -> bool:
    return gain.now > 0.05 and empty.now > 0.8 * gain.now


RULES = (
    Rule(
        "no thought counts",
        ("thought/uncounted_frac",),
        lambda share: share.now >= 0.99,
        "No thought counts: all are cut off or aborted, so the policy is not trained. Set {unclosed}, "
        "or raise {limit}.",
        size=3,
    ),
    Rule(
        "few thoughts count",
        ("thought/uncounted_frac",),
        _between(0.2, 0.99),
        "{0:.0%} of the thoughts do not count, cut off or aborted. Set {unclosed}, or raise {limit}.",
    ),
    Rule(
        "equal rewards",
        ("frac_reward_zero_std",),
        _above(0.9),
        "In {0:.0%} of the groups all thoughts have the same reward, so nothing is learned from them. "
        "Raise {thoughts} or {temperature}, or choose other {positions}.",
        size=5,
    ),
    Rule(
        "only the tags are learnt",
        ("ig/frozen", "ig/empty"),
        _only_tags_gain,
        "Only the tags are learnt: an empty thought gains {1:.2f} nats, a sampled one {0:.2f}. "
        "Choose {positions} where thinking can help, or raise {limit} or {thoughts}.",
        size=5,
    ),
    Rule(
        "the gain falls",
        ("ig/frozen",),
        _gain_falls,
        "The gain against the frozen model fell to {0:.2f} nats (at the start {start:.2f}, at best "
        "{best:.2f}). Lower {rate}, or raise {next_token}.",
        size=3,
    ),
    Rule(
        "the no-think loss rises",
        ("ntp/loss",),
        _rose_by(0.1),
        "The loss without a thought rose from {start:.2f} to {0:.2f} nats a token. Raise {next_token}, or "
        "lower {rate}.",
    ),
    Rule(
        "steps are skipped",
        ("run/skipped_steps",),
        _above(0.0),
        "{0:.0f} steps were skipped for NaN or inf; a skipped step trains nothing. Lower {rate}, or train in "
        "float32.",
        size=1,
    ),
    Rule(
        "thoughts are cut off",
        ("completions/clipped_ratio",),
        _above(0.1),
        "{0:.0%} of the thoughts end at their limit. Raise {limit}, if thoughts of that length are wanted.",
        after=20,
    ),
    Rule(
        "thoughts hold the target",
        ("thought/leakage",),
        _rose_by(0.2),
        "Thoughts contain more and more of the target (overlap {start:.2f} to {0:.2f}): is it worked out, or "
        "leaked?",
    ),
    Rule(
        "thoughts repeat themselves",
        ("thought/repetition",),
        _above(0.3),
        "{0:.0%} of the 4-grams of a thought are repeated. Lower {limit}, or raise {temperature}.",
    ),
    Rule(
        "thoughts are stale",
        ("sample/staleness_max",),
        _above(4.0),
        "Thoughts up to {0:.0f} steps old are trained on. Lower {staleness}.",
        size=3,
    ),
)


class Health:
    """Takes the metrics of a run, step by step, and returns each warning once.

    >>> health = Health()
    >>> [str(f)[:22] for step in range(1, 5) for f in health.observe(step, {"thought/uncounted_frac": 1.0})]
    ['No thought counts: all']
    """

    def __init__(self, fields: Mapping[str, str] = FIELDS):
        self.fields = fields
        self.findings: list[Finding] = []
        self._courses: dict[tuple[str, str], Course] = {}

    def observe(self, step: int, row: Mapping[str, float | None]) -> list[Finding]:
        """Add one step's metrics; returns the new warnings. Values that are not finite are ignored."""
        if any(name.startswith("source/") for name in row):
            # The loss over all sources follows their weights; the collapse monitor watches each source.
            row = {name: value for name, value in row.items() if name != "ntp/loss"}
        elif "ntp/trained_loss" in row:
            # What is not trained, such as the prompts of sft_mixed, may be forgotten.
            row = {**row, "ntp/loss": row["ntp/trained_loss"]}
        judged = [self._judge(rule, step, row) for rule in RULES]
        new = [finding for finding in judged if finding is not None]
        self.findings += new
        return new

    def replay(self, rows: Iterable[Mapping[str, float | None]]) -> list[Finding]:
        """Add the rows of metrics.jsonl; returns all warnings."""
        for row in rows:
            self.observe(int(row.get("step") or 0), row)
        return self.findings

    def _judge(self, rule: Rule, step: int, row: Mapping[str, float | None]) -> Finding | None:
        """Add the rule's metrics to its courses; a Finding if the rule holds for the first time."""
        values = [row.get(name) for name in rule.metrics]
        finite = [value for value in values if value is not None and math.isfinite(value)]
        if len(finite) < len(values):
            return None
        courses = [self._courses.setdefault((rule.name, name), Course(rule.size)) for name in rule.metrics]
        for course, value in zip(courses, finite, strict=True):
            course.add(float(value))
        is_known = any(finding.rule == rule.name for finding in self.findings)
        if is_known or courses[0].count < max(rule.after, rule.size) or not rule.holds(*courses):
            return None
        means = [course.now for course in courses]
        text = rule.text.format(*means, start=courses[0].start, best=courses[0].best, **self.fields)
        return Finding(rule.name, step, text)
