"""What is wrong with a run, in words, with the setting to change: one set of rules for the console, the
report and TRL.

A rule looks at the course of one or two metrics: their mean at the start of the run, their mean now and the
best mean so far. It speaks once, when it first holds. Its numbers come from metrics.jsonl alone, so a
finished run is judged as a live one is.
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
    """What a rule found, and at which step first."""

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

    def add(self, value: float) -> None:
        """Take in the next finite value."""
        self.count += 1
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


@dataclass(frozen=True, slots=True)
class Rule:
    """When a run is unwell: `holds` of the courses of `metrics`, each over `size` values and seen at least
    `after` times.
    """

    name: str
    metrics: tuple[str, ...]
    size: int
    holds: Callable[..., bool]
    text: str
    after: int = 0


def _falls(gain: Course) -> bool:
    """Below its best by more than half of it and more than .2 nats, or below both 0 and its start by more
    than .2 nats.
    """
    return gain.now < gain.best - max(0.2, 0.5 * abs(gain.best)) or gain.now < min(0.0, gain.start) - 0.2


def _only_tags(gain: Course, empty: Course) -> bool:
    return gain.now > 0.05 and empty.now > 0.8 * gain.now


RULES = (
    Rule(
        "no thought counts",
        ("thought/uncounted_frac",),
        3,
        lambda share: share.now >= 0.99,
        "No thought counts: every one is cut off or aborted, so the policy is not trained. Set {unclosed}, "
        "or raise {limit}.",
    ),
    Rule(
        "few thoughts count",
        ("thought/uncounted_frac",),
        10,
        lambda share: 0.2 < share.now < 0.99,
        "{0:.0%} of the thoughts count nowhere, cut off or aborted. Set {unclosed}, or raise {limit}.",
    ),
    Rule(
        "equal rewards",
        ("frac_reward_zero_std",),
        5,
        lambda share: share.now > 0.9,
        "In {0:.0%} of the groups all thoughts earn the same, so nothing is learned from them. "
        "Raise {thoughts} or {temperature}, or choose other {positions}.",
    ),
    Rule(
        "only the tags are learnt",
        ("ig/frozen", "ig/empty"),
        3,
        _only_tags,
        "Only the tags are learnt: an empty thought gains {1:.2f} nats, a sampled one {0:.2f}. "
        "Choose {positions} where thinking can help, or raise {limit} or {thoughts}.",
    ),
    Rule(
        "the gain falls",
        ("ig/frozen",),
        3,
        _falls,
        "The gain against the frozen model fell to {0:.2f} nats (at the start {start:.2f}, at best "
        "{best:.2f}). Lower {rate}, or raise {next_token}.",
    ),
    Rule(
        "the no-think loss rises",
        ("ntp/loss",),
        10,
        lambda loss: loss.now > loss.start + 0.1,
        "The loss without a thought rose from {start:.2f} to {0:.2f} nats a token. Raise {next_token}, or "
        "lower {rate}.",
    ),
    Rule(
        "steps are skipped",
        ("run/skipped_steps",),
        1,
        lambda skipped: skipped.now > 0,
        "{0:.0f} steps were skipped for NaN or inf; a skipped step trains nothing. Lower {rate}, or train in "
        "float32.",
    ),
    Rule(
        "thoughts are cut off",
        ("completions/clipped_ratio",),
        10,
        lambda share: share.now > 0.1,
        "{0:.0%} of the thoughts end at their limit. Raise {limit}, if thoughts of that length are wanted.",
        after=20,
    ),
    Rule(
        "thoughts hold the target",
        ("thought/leakage",),
        10,
        lambda share: share.now > share.start + 0.2,
        "Thoughts hold more and more of the target (overlap {start:.2f} to {0:.2f}): is it worked out, or "
        "leaked?",
    ),
    Rule(
        "thoughts repeat themselves",
        ("thought/repetition",),
        10,
        lambda share: share.now > 0.3,
        "{0:.0%} of the 4-grams of a thought were in it before. Lower {limit}, or raise {temperature}.",
    ),
    Rule(
        "thoughts are stale",
        ("sample/staleness_max",),
        3,
        lambda age: age.now > 4,
        "Thoughts up to {0:.0f} steps old are trained on. Lower {staleness}.",
    ),
)


class Health:
    """Takes in the metrics of a run, step by step, and says what is wrong with it, each thing once.

    >>> health = Health()
    >>> [str(f)[:22] for step in range(1, 5) for f in health.observe(step, {"thought/uncounted_frac": 1.0})]
    ['No thought counts: eve']
    """

    def __init__(self, fields: Mapping[str, str] = FIELDS):
        self.fields = fields
        self.findings: list[Finding] = []
        self._courses: dict[tuple[str, str], Course] = {}

    def observe(self, step: int, row: Mapping[str, float | None]) -> list[Finding]:
        """Take in one step's metrics; what is found now for the first time. Values that are not finite are
        left out.
        """
        new = [found for rule in RULES if (found := self._judge(rule, step, row)) is not None]
        self.findings += new
        return new

    def replay(self, rows: Iterable[Mapping[str, float | None]]) -> list[Finding]:
        """Take in the rows of metrics.jsonl, and return all that was found."""
        for row in rows:
            self.observe(int(row.get("step") or 0), row)
        return self.findings

    def _judge(self, rule: Rule, step: int, row: Mapping[str, float | None]) -> Finding | None:
        courses = [self._courses.setdefault((rule.name, name), Course(rule.size)) for name in rule.metrics]
        values = [row.get(name) for name in rule.metrics]
        if any(value is None or not math.isfinite(value) for value in values):
            return None
        for course, value in zip(courses, values, strict=True):
            course.add(float(value or 0.0))
        spoken = any(found.rule == rule.name for found in self.findings)
        if spoken or courses[0].count < max(rule.after, rule.size) or not rule.holds(*courses):
            return None
        means = [course.now for course in courses]
        text = rule.text.format(*means, start=courses[0].start, best=courses[0].best, **self.fields)
        return Finding(rule.name, step, text)
