"""Judges for tests, which a configuration names by path."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

ASKED: list[dict[str, str]] = []
"""The texts that `longer` was asked about."""


def _judge(prefers: Callable[[dict[str, str]], bool]):
    async def judge(questions: Sequence[str]) -> list[str | None]:
        texts = [json.loads(question.split("\n\n", 1)[1]) for question in questions]
        ASKED.extend(texts)
        return [f"Score: {int(prefers(each))}" for each in texts]

    return judge


first = _judge(lambda texts: True)
longer = _judge(lambda texts: len(texts["first"].split()) >= len(texts["second"].split()))
later = _judge(lambda texts: texts["first"] > texts["second"])


async def broken(questions: Sequence[str]) -> list[str | None]:
    """Says nothing that is a verdict."""
    return ["Score: 1 or Score: 0", None, "no"][: len(questions)] + ["?"] * (len(questions) - 3)
