"""Which continuation is better: scores from a judge's verdicts, and texts that try to judge themselves."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlpretrain.judge import Judge, endpoint
from rlpretrain.preferences import Candidates, pair_question, parse_score, point_question, score_candidates
from tests.builders.judges import ATTACKS, serving

CONTEXT = "it was"
WORTH = {"bad": 0, "fair": 1, "good": 2, "best": 3}


def told(question: str) -> dict[str, str]:
    """The texts in a question."""
    return json.loads(question.split("\n\n", 1)[1])


def scored(
    answer: Callable[[dict[str, str]], str | None], *texts: Sequence[str], form: Any = "pairwise", **how: Any
) -> tuple[list[list[float]], dict[str, int]]:
    async def ask(questions: Sequence[str]) -> list[str | None]:
        return [answer(told(question)) for question in questions]

    judge = Judge(ask, "leave_out")
    sets = [Candidates(CONTEXT, each) for each in texts]
    scores = asyncio.run(score_candidates(judge, sets, form, "is better", **how))
    return scores, judge.counts


def exact(texts: dict[str, str]) -> str:
    if "candidate" in texts:
        return f"Score: {2 * WORTH[texts['candidate']]}"
    return f"Score: {int(WORTH[texts['first']] >= WORTH[texts['second']])}"


def test_pairwise_scores_are_the_shares_of_comparisons_won():
    (scores,), counts = scored(exact, ["fair", "best", "bad", "good"])
    assert scores == pytest.approx([1 / 3, 1, 0, 2 / 3]) and counts["asked"] == 4 * 3  # K(K-1)/2, both orders


def test_a_pivot_asks_about_each_candidate_once_in_both_orders():
    scores, counts = scored(exact, ["fair", "best", "bad", "good"], ["good", "good"], form="pivot")
    assert scores == [[1 / 3, 1, 0, 1], [0.5, 0.5]] and counts["asked"] == 2 * 3  # equal texts are not asked


def test_pointwise_scores_and_their_replies():
    scores, counts = scored(exact, ["fair", "best"], ["good"], form="pointwise")
    assert scores == [[0.2, 0.6], [0.5]] and counts["asked"] == 2  # nothing to choose: not asked
    assert [parse_score(r) for r in ("Score: 0", "score: 10.", "Score: 11", "Score: -1", "7", None)] == [
        0,
        1,
        None,
        None,
        None,
        None,
    ]


@pytest.mark.parametrize("form", ["pairwise", "pivot"])
@pytest.mark.parametrize("always", [0, 1])
def test_a_judge_that_prefers_a_place_prefers_nothing(form, always):
    (scores,), _ = scored(lambda texts: f"Score: {always}", ["bad", "good", "best"], form=form)
    assert scores == [0.5, 0.5, 0.5]


@pytest.mark.parametrize("form", ["pairwise", "pivot", "pointwise"])
def test_what_could_not_be_judged(form):
    """A text that breaks the judge wins nothing, or has no score; a judge that is down prefers nothing."""

    def breaks(texts: dict[str, str]) -> str | None:
        return "I refuse" if "bad" in texts.values() else exact(texts)

    (zero,), counts = scored(breaks, ["fair", "bad", "best"], form=form)
    assert zero[1] == 0 and zero[2] > zero[0] and counts["failed"] > 0
    (left_out,), _ = scored(breaks, ["fair", "bad", "best"], form=form, failure="leave_out")
    assert math.isnan(left_out[1]) and left_out[2] > left_out[0]
    (down,), _ = scored(lambda texts: None, ["fair", "bad", "best"], form=form)
    assert down == [0, 0, 0]


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=40) | st.sampled_from(ATTACKS), st.text(max_size=40) | st.sampled_from(ATTACKS))
def test_a_candidate_cannot_leave_its_quotation(candidate, other):
    question = pair_question("{candidate} is better", other, candidate, "x")
    assert told(question) == {"context": other, "first": candidate, "second": "x"}
    assert told(point_question("is better", other, candidate)) == {"context": other, "candidate": candidate}


def test_verdicts_over_http_are_cached_and_a_timeout_is_no_verdict():
    def reply(body: dict[str, Any]) -> tuple[int, Any]:
        texts = told(body["messages"][0]["content"])
        return (500, b"") if "bad" in texts.values() else (200, exact(texts))

    with serving(reply) as (url, asked):
        judge = Judge(endpoint(url, "big", retries=0), "leave_out")
        sets = [Candidates(CONTEXT, ["fair", "best", "bad"])]
        first = asyncio.run(score_candidates(judge, sets, "pairwise", "is better"))
        again = asyncio.run(score_candidates(judge, sets, "pairwise", "is better"))
        assert first == again == [[0.0, 0.5, 0.0]]
        assert judge.counts == {"asked": 6 + 4, "cached": 2, "failed": 8} and len(asked) == 10
