"""The rules that say what is wrong with a run (issue 15.21): each fires when it should, once, and names a
setting.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pytest

from rlpretrain.config import PretrainConfig
from rlpretrain.config.io import describe
from rlpretrain.tracking.health import FIELDS, RULES, TRL_FIELDS, Finding, Health
from rlpretrain.tracking.metrics import METRICS

WELL = {
    "thought/uncounted_frac": 0.05,
    "frac_reward_zero_std": 0.4,
    "ig/frozen": 0.4,
    "ig/empty": 0.1,
    "ntp/loss": 2.0,
    "run/skipped_steps": 0.0,
    "completions/clipped_ratio": 0.02,
    "thought/leakage": 0.2,
    "thought/repetition": 0.1,
    "sample/staleness_max": 1.0,
}


def course(before: Mapping[str, float], after: Mapping[str, float], steps: int = 30) -> list[Finding]:
    """What is found in a run that is well, but for `before` in its first half and `after` in its second."""
    rows = [{"step": k, **WELL, **(before if k <= steps else after)} for k in range(1, 2 * steps + 1)]
    return Health().replay(rows)


def test_a_run_that_is_well_is_left_alone():
    assert course({}, {}) == []
    assert course({"ig/frozen": -8.0, "ig/empty": -4.0}, {}) == [], (
        "a base that never saw the tags, and learns"
    )
    assert course({"ig/frozen": -8.0}, {"ig/frozen": -8.1}) == [], "a tenth of a nat is noise"


@pytest.mark.parametrize(
    ("rule", "before", "after", "says"),
    [
        (
            "no thought counts",
            {"thought/uncounted_frac": 1.0},
            {"thought/uncounted_frac": 1.0},
            "sampling.cut: penalise",
        ),
        ("few thoughts count", {}, {"thought/uncounted_frac": 0.5}, "of the thoughts do not count"),
        ("equal rewards", {}, {"frac_reward_zero_std": 1.0}, "all thoughts have the same reward"),
        ("only the tags are learnt", {}, {"ig/frozen": 0.9, "ig/empty": 0.85}, "an empty thought gains"),
        ("the gain falls", {}, {"ig/frozen": -0.5, "ig/empty": -1.0}, "at best 0.40"),
        ("the gain falls", {"ig/frozen": 2.0}, {"ig/frozen": 0.7}, "at the start 2.00"),
        ("the no-think loss rises", {}, {"ntp/loss": 2.3}, "from 2.00"),
        ("steps are skipped", {}, {"run/skipped_steps": 1.0}, "1 steps were skipped"),
        ("thoughts are cut off", {}, {"completions/clipped_ratio": 0.9}, "sampling.max_thought_tokens"),
        ("thoughts hold the target", {}, {"thought/leakage": 0.9}, "leaked?"),
        ("thoughts repeat themselves", {}, {"thought/repetition": 0.9}, "4-grams"),
        ("thoughts are stale", {}, {"sample/staleness_max": 9.0}, "engine.max_staleness"),
    ],
)
def test_each_rule_speaks_once_and_alone(rule, before, after, says):
    found = course(before, after)
    assert [f.rule for f in found] == [rule]
    assert says in found[0].text
    assert "{" not in found[0].text


def test_no_thought_that_counts_is_said_at_the_third_step():
    """The README's recipe on a base without tags: it must not take a run to see it."""
    found = Health().replay([{"step": k, "thought/uncounted_frac": 1.0} for k in range(1, 4)])
    assert [(f.step, f.rule) for f in found] == [(3, "no thought counts")]


def test_values_that_are_not_finite_or_not_there_are_no_evidence():
    rows = [
        {"step": k, **WELL, "ntp/loss": math.nan, "ig/frozen": None, "run/skipped_steps": math.inf}
        for k in range(1, 40)
    ]
    assert Health().replay(rows) == []


def test_the_loss_of_what_is_not_trained_may_rise():
    """The prompts of sft_mixed are forgotten while its answers are learnt."""
    rows = [{"step": k, **WELL, "ntp/loss": 2.0 + 0.02 * k} for k in range(1, 40)]
    assert Health().replay([row | {"ntp/trained_loss": 1.0} for row in rows]) == []
    rising = [row | {"ntp/loss": 2.0, "ntp/trained_loss": row["ntp/loss"]} for row in rows]
    assert [finding.rule for finding in Health().replay(rising)] == ["the no-think loss rises"]


def test_a_replayed_log_says_what_the_live_run_said():
    rows = [{"step": k, **WELL, "ntp/loss": 2.0 + 0.02 * k} for k in range(1, 40)]
    live = Health()
    said = [finding for row in rows for finding in live.observe(row["step"], row)]
    assert said == Health().replay(rows) != []


def test_rules_read_metrics_that_are_logged_and_name_settings_that_exist():
    assert {name for rule in RULES for name in rule.metrics} <= METRICS.keys()
    known = {name for name, *_ in describe(PretrainConfig)} | {"objective.positions"}
    assert {name.split(":")[0] for name in FIELDS.values()} <= known
    assert FIELDS.keys() == TRL_FIELDS.keys()
    for rule in RULES:
        rule.text.format(0.0, 0.0, start=0.0, best=0.0, **TRL_FIELDS)


def test_the_noise_of_small_steps_is_not_taken_for_a_change():
    """Eight short documents a step: the loss moves by .15 between steps, the gain by 1. Then both change."""
    rng = np.random.default_rng(0)
    health = Health()
    for step in range(1, 121):
        row = {"ntp/loss": 1.4 + 0.15 * rng.standard_normal(), "ig/frozen": 0.5 + rng.standard_normal()}
        assert not health.observe(step, row), step
    for step in range(121, 160):
        row = {"ntp/loss": 2.0 + 0.15 * rng.standard_normal(), "ig/frozen": -5.0 + rng.standard_normal()}
        health.observe(step, row)
    assert {finding.rule for finding in health.findings} == {"the gain falls", "the no-think loss rises"}
