"""Controls on token ids, and the monitor that recognises a collapse."""

import json
import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards import (
    CollapseMonitor,
    distinct_n,
    empty,
    filler,
    other_document,
    repetition,
    shuffled,
    target_leakage,
)

ids = st.lists(st.integers(0, 5), max_size=12)


def test_target_leakage() -> None:
    assert target_leakage([5, 6, 7, 8], [7]) == 1.0 and target_leakage([5, 6], [7]) == 0.0
    assert target_leakage([5, 6, 7], [6, 7, 8]) == pytest.approx(2 / 3)
    assert target_leakage([5, 7, 6], [6, 7], n=2) == 0.0
    assert target_leakage([1, 2], [2], n=4) == 1.0  # n is lowered to the target's length
    assert target_leakage([], [2]) == 0.0 and target_leakage([1], []) == 0.0
    with pytest.raises(ValueError, match="n 0"):
        target_leakage([1], [1], n=0)


@settings(deadline=None)
@given(ids, ids, st.integers(1, 4))
def test_target_leakage_is_a_share_and_whole_for_a_thought_that_holds_the_target(thought, target, n) -> None:
    assert 0.0 <= target_leakage(thought, target, n) <= 1.0
    if target:
        assert target_leakage([*thought, *target], target, n) == 1.0


@settings(deadline=None)
@given(ids, st.integers(0, 99))
def test_shuffled_keeps_the_tokens_and_the_close_tag(thought, seed) -> None:
    """Pitfall 15: the contrast that tells content from mere words."""
    mixed = shuffled(thought, seed)
    assert (
        Counter(mixed) == Counter(thought) and mixed[-1:] == thought[-1:] and mixed == shuffled(thought, seed)
    )
    assert (mixed != thought) == (len(set(thought[:-1])) > 1)
    whole = shuffled(thought, seed, keep_last=False)
    assert Counter(whole) == Counter(thought) and (whole != thought) == (len(set(thought)) > 1)


def test_empty_and_filler() -> None:
    assert empty([4, 5, 99]) == [99] and empty([4, 5], keep_last=False) == [] and empty([]) == []
    assert (
        filler([4, 5, 99], 0) == [0, 0, 99]
        and filler([4, 5], 0, keep_last=False) == [0, 0]
        and filler([], 0) == []
    )


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from("abcd"), min_size=2, max_size=14).filter(lambda x: len(set(x)) > 1),
    st.integers(0, 99),
)
def test_other_document_is_always_another_and_used_evenly(documents, seed) -> None:
    chosen = other_document(documents, seed)
    assert all(documents[donor] != own for donor, own in zip(chosen, documents, strict=True))
    assert chosen == other_document(documents, seed)
    if 2 * max(Counter(documents).values()) <= len(documents):
        assert sorted(chosen) == list(range(len(documents)))


def test_other_document_needs_two() -> None:
    assert other_document(["a", "b"], seed=3) == [1, 0]
    for documents in ([], ["a"], ["a", "a"]):
        with pytest.raises(ValueError, match="two documents"):
            other_document(documents, seed=0)


def test_repetition_and_distinct() -> None:
    """Pitfall 15: a thought that loops, and a group of which all say the same."""
    assert repetition([1] * 10, n=2) == pytest.approx(8 / 9) and repetition([1, 2, 3, 4, 5]) == 0.0
    assert repetition([1, 2]) == 0.0 and repetition([]) == 0.0
    assert (
        distinct_n([[1, 2, 3]] * 4) == 0.25 and distinct_n([[1, 2], [3, 4]]) == 1.0 and distinct_n([]) == 1.0
    )


def run(monitor: CollapseMonitor, gains: list[float], losses: list[float] | None = None) -> list[str | None]:
    return [
        monitor.observe(gain=gain, no_think_loss=loss, grad_norm=1.0, thought_length=9.0)
        for gain, loss in zip(gains, losses or [1.0] * len(gains), strict=True)
    ]


def test_monitor_fires_when_the_gain_stays_negative_after_it_was_positive() -> None:
    """Pitfall 15. One bad batch does not fire; a window of them does."""
    verdicts = run(CollapseMonitor(window=4), [0.5] * 6 + [-1.0] + [0.5] * 4 + [-1.0] * 4)
    assert verdicts[:12] == [None] * 12 and "information gain fell to -0.250 nats" in str(verdicts[12])


def test_monitor_waits_for_a_run_that_has_not_begun_and_allows_small_dips() -> None:
    assert run(CollapseMonitor(window=2), [-1.0] * 10) == [None] * 10
    assert run(CollapseMonitor(window=2, margin=0.2), [0.1] * 4 + [-0.05] * 4) == [None] * 8


def test_monitor_fires_when_the_no_think_loss_rises() -> None:
    """Pitfall 19: measured collapses went from 1.17 to 1.4–1.7."""
    losses = [1.17] * 4 + [1.25] * 4 + [1.6] * 4
    verdicts = run(CollapseMonitor(window=4, no_think_loss=1.17), [1.0] * 12, losses)
    assert verdicts[:8] == [None] * 8 and "no-think loss rose" in str(verdicts[-1])
    assert "no-think loss rose" in str(run(CollapseMonitor(window=4), [1.0] * 12, losses)[-1])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_a_number_enters_no_mean_sets_no_best_and_ends_no_run(value: float) -> None:
    """Issue 15.12: one NaN used to end the run, and what came after it was not looked at."""
    gains = [1.0, 1.0, 1.0, 1.0, -1.0, -1.0, -1.0]
    holes = [1.0, value, 1.0, value, value, 1.0, 1.0, value, -1.0, value, -1.0, -1.0]
    plain, holed = CollapseMonitor(window=4), CollapseMonitor(window=4)
    verdict = run(plain, gains)[-1]
    assert verdict is not None and run(holed, holes) == [None] * 11 + [verdict]
    assert holed.state_dict() == plain.state_dict() | {"losses": [1.0] * 4}
    losses = CollapseMonitor(window=2, no_think_loss=1.0)
    assert [reason is None for reason in run(losses, [1.0] * 5, [1.0, value, 1.0, value, 3.0])] == [
        True
    ] * 4 + [False]
    norm = CollapseMonitor().observe(gain=1.0, no_think_loss=1.0, grad_norm=value, thought_length=value)
    assert norm is None


@settings(deadline=None)
@given(st.lists(st.floats(-2, 2), min_size=8, max_size=24), st.integers(0, 8))
def test_monitor_resumes_where_it_stopped(gains: list[float], split: int) -> None:
    whole = run(CollapseMonitor(window=3), gains)
    first, second = CollapseMonitor(window=3), CollapseMonitor(window=3)
    before = run(first, gains[:split])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert before + run(second, gains[split:]) == whole


def test_monitor_refuses_settings_that_mean_nothing() -> None:
    for options in ({"window": 0}, {"margin": -1.0}, {"no_think_rise": 0.0}):
        with pytest.raises(ValueError, match="window"):
            CollapseMonitor(**options)
