"""Worked problems with wrong steps, and oracle judges of their continuations, for `sip`.

A document is a question and its trace, `ann has 6 bob up3 cat times3 . so` and `6 bob up3 9 cat times3 7 .`;
a share of the traces has a wrong step. Its rewrite is the trace itself where that is right; a wrong one is
repaired with probability `repaired`. A continuation is as good as the share of it that is right before its
first wrong word.

The judges answer the questions of rlpretrain/preferences.py. `exact` knows the truth, `flips_10` and
`flips_30` give the opposite verdict on so many percent of the questions, and `chance` on half of them: its
verdicts say nothing. The same question always has the same verdict.
"""

from __future__ import annotations

import json
import random
from collections.abc import Awaitable, Callable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

from rlpretrain.corpora.dial_problems import OPERATIONS, Problem, split_problems
from rlpretrain.corpora.writing import save_rows
from rlpretrain.preferences import TOP

JudgeFunction = Callable[[Sequence[str]], Awaitable[list[str | None]]]


def record(problem: Problem, rng: random.Random, wrong: float = 0.3, repaired: float = 0.7) -> dict[str, Any]:
    """A worked problem as a JSON line; `right` says whether its answer is the true trace."""
    truth = problem.trace()
    answer = wrong_trace(problem, rng) if rng.random() < wrong else truth
    rewrite = truth if answer == truth or rng.random() < repaired else wrong_trace(problem, rng)
    return {
        "question": " ".join([*problem.question(), ".", "so"]),
        "answer": " ".join([*answer, "."]),
        "rewrite": " ".join([*rewrite, "."]),
        "right": answer == truth,
        "depth": problem.depth,
    }


def wrong_trace(problem: Problem, rng: random.Random) -> list[str]:
    """A trace with one wrong step, on which the steps after it build."""
    words, value, wrong = [str(problem.start)], problem.start, rng.randrange(problem.depth)
    for i, (name, operation, _) in enumerate(problem.steps()):
        value = OPERATIONS[operation](value)
        if i == wrong:
            value = (value + rng.randrange(1, 10)) % 10
        words += [name, operation, str(value)]
    return words


def write(
    out: str | Path, *, train: int = 20_000, held_out: int = 600, seed: int = 0, wrong: float = 0.3
) -> dict[str, Path]:
    """Write train.jsonl, with a share `wrong` of wrong traces, and held_out.jsonl, with none, under `out`."""
    held, training = split_problems(train, held_out, seed, (1, 2, 3, 4), (1, 2, 3, 4))

    def rows(problems: Any, share: float, role: str) -> Iterator[dict[str, Any]]:
        rng = random.Random(f"dial judge {role} {seed}")
        return (record(problem, rng, share) for problem in problems)

    files = {"train": rows(training, wrong, "train"), "held_out": rows(held, 0.0, "held_out")}
    return save_rows(Path(out), files)


def quality(context: str, text: str) -> float:
    """The share of a continuation that is right before its first wrong word; 0 after any other context."""
    words = context.split()
    if len(words) < 6 or words[1] != "has" or words[-2:] != [".", "so"]:
        return 0.0
    operations = words[4:-2:2]
    if not words[2].isdigit() or not set(operations) <= OPERATIONS.keys():
        return 0.0
    value, truth = int(words[2]), [words[2]]
    for name, operation in zip(words[3:-2:2], operations, strict=True):
        value = OPERATIONS[operation](value)
        truth += [name, operation, str(value)]
    truth.append(".")
    said, right = text.split(), 0
    for true_word, word in zip(truth, said, strict=False):
        if word != true_word:
            break
        right += 1
    return right / max(len(truth), len(said))


def make_judge(flipped: float = 0.0, seed: int = 0) -> JudgeFunction:
    """Return an oracle that flips a share of its verdicts; which ones depends on the seed and the question.

    Of two equally good texts it prefers the one in the first place, so both orders together prefer none.
    """

    async def judge(prompts: Sequence[str]) -> list[str | None]:
        return [f"Score: {_verdict(prompt, flipped, seed)}" for prompt in prompts]

    return judge


def _verdict(prompt: str, flipped: float, seed: int) -> int:
    texts = json.loads(prompt[prompt.rindex('{"context"') :])
    if "candidate" in texts:
        top, number = TOP, round(TOP * quality(texts["context"], texts["candidate"]))
    else:
        first, second = (quality(texts["context"], texts[name]) for name in ("first", "second"))
        top, number = 1, int(first >= second)
    digest = blake2b(f"{seed}\n{prompt}".encode(), digest_size=8).digest()
    return top - number if int.from_bytes(digest, "big") < flipped * 2**64 else number


exact = make_judge()
flips_10 = make_judge(0.1)
flips_30 = make_judge(0.3)
chance = make_judge(0.5)
