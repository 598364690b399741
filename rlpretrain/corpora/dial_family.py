"""The dial in every method's format: what a small model must have read before it can box, write, mask and
judge.

A plain document has three sentences, `ann has 6 bob up3 cat times3 . it shows 7 . that is odd .`, so that
there is one to be predicted from both sides. Beside plain, worked and idle text the base mix holds, each with
a thought that is mostly useless:

    think      a thought before the digit, inside the document                      rlp, likelihood
    sentence   a thought before the second sentence                                 rlpt, information gain
    box        `box` + text up to the digit, thought, `\\boxed{ 7 }`             rpt
    tell       `tell` + first sentence, thought, the second between delimiters      rlpt: match, judge
    fill       `fill` + first, a mask, third sentence, thought, the second          rlpt, middle segment
    hide       `hide` + the document, thought, a piece of it in `\\mask{ }`          pretrain_zero, generator
    find       `find` + the document with a piece masked, thought, `\\boxed{ }`      pretrain_zero, predictor

The word in front takes the place of an instruction. `judge` is an oracle for RLPT: it knows what a sentence
says.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlpretrain.corpora import dial
from rlpretrain.corpora.dial import CLOSE, HMM, OPEN, Problem, draw, thought

MASK, HIDDEN = "<MASK>", "[mask]"
BOX, NAME, END = "\\boxed{", "\\mask{", "}"
SAY, SAID = "<|startofprediction|>", "<|endofprediction|>"
TASKS = ("box", "tell", "fill", "hide", "find")
WORDS = (*dial.WORDS, "it", "that", "is", "odd", "even", *TASKS, MASK, HIDDEN, BOX, NAME, END, SAY, SAID)


@dataclass(frozen=True, slots=True)
class Mix(dial.Mix):
    """Shares of all formats; how long their problems are and what is thought about them is as in the
    dial's mixes.
    """

    prose: float = 0.12
    chain: float = 0.10
    worked: float = 0.33
    plain: float = 0.12
    think: float = 0.08
    sentence: float = 0.03
    box: float = 0.06
    tell: float = 0.05
    fill: float = 0.04
    hide: float = 0.03
    find: float = 0.04
    full_trace: float = 0.25
    part_trace: float = 0.05
    worked_depths: tuple[int, int] = (1, 6)
    think_depths: tuple[int, int] = (1, 4)
    deep: float = 0.05
    refrain: float = 1.0


MIXES: Mapping[str, Mix] = {"f1": Mix()}


def first(problem: Problem) -> list[str]:
    """`ann has 6 bob up3 cat times3 .`"""
    return [*problem.question(), "."]


def second(problem: Problem) -> list[str]:
    """`it shows 7 .`"""
    return ["it", "shows", str(problem.answer), "."]


def third(problem: Problem) -> list[str]:
    """`that is odd .`"""
    return ["that", "is", "odd" if problem.answer % 2 else "even", "."]


def document(problem: Problem) -> list[str]:
    """All three."""
    return [*first(problem), *second(problem), *third(problem)]


def plain(rng: random.Random, mix: Mix) -> list[str]:
    """What reinforcement pretraining sees."""
    return document(draw(rng, mix.plain_depths))


def think(rng: random.Random, mix: Mix) -> list[str]:
    """A thought before the digit."""
    problem, words = thought(rng, mix)
    return [*first(problem), "it", "shows", OPEN, *words, CLOSE, str(problem.answer), ".", *third(problem)]


def sentence(rng: random.Random, mix: Mix) -> list[str]:
    """A thought before the second sentence."""
    problem, words = thought(rng, mix)
    return [*first(problem), OPEN, *words, CLOSE, *second(problem), *third(problem)]


def box(rng: random.Random, mix: Mix) -> list[str]:
    """The next word in a box, sometimes the next two."""
    problem, words = thought(rng, mix)
    said = second(problem)[2 : 3 if rng.random() < 0.8 else 4]
    return ["box", *first(problem), "it", "shows", OPEN, *words, CLOSE, BOX, *said, END]


def tell(rng: random.Random, mix: Mix) -> list[str]:
    """The second sentence between RLPT's delimiters."""
    problem, words = thought(rng, mix)
    return ["tell", *first(problem), OPEN, *words, CLOSE, SAY, *second(problem), SAID]


def fill(rng: random.Random, mix: Mix) -> list[str]:
    """The second sentence, with the third known: between delimiters, as it is, or without a thought."""
    problem, words = thought(rng, mix)
    head, u = ["fill", *first(problem), MASK, *third(problem)], rng.random()
    if u < 0.25:
        return [*head, *second(problem)]
    said = second(problem) if u < 0.5 else [SAY, *second(problem), SAID]
    return [*head, OPEN, *words, CLOSE, *said]


def piece(rng: random.Random, words: Sequence[str]) -> tuple[int, int]:
    """Where a piece to hide begins and ends: the answer, the last word, or one or two words anywhere."""
    u = rng.random()
    if u < 0.7:
        at = len(words) - (6 if u < 0.5 else 2)
        return at, at + 1
    at = rng.randrange(len(words) - 1)
    return at, at + rng.choice((1, 1, 2))


def hide(rng: random.Random, mix: Mix) -> list[str]:
    """A piece of the document named as a task."""
    words = document(draw(rng, mix.think_depths))
    start, stop = piece(rng, words)
    idle = [rng.choice(HMM) for _ in range(rng.randint(1, 3))]
    return ["hide", *words, OPEN, *idle, CLOSE, NAME, *words[start:stop], END]


def find(rng: random.Random, mix: Mix) -> list[str]:
    """A hidden piece found again."""
    problem, thoughts = thought(rng, mix)
    words = document(problem)
    start, stop = piece(rng, words)
    return [
        "find",
        *words[:start],
        HIDDEN,
        *words[stop:],
        OPEN,
        *thoughts,
        CLOSE,
        BOX,
        *words[start:stop],
        END,
    ]


FORMATS: dial.Formats = {
    "prose": dial.prose,
    "chain": dial.chain,
    "worked": dial.worked,
    "plain": plain,
    "think": think,
    "sentence": sentence,
    "box": box,
    "tell": tell,
    "fill": fill,
    "hide": hide,
    "find": find,
}


def record(problem: Problem) -> dict[str, Any]:
    """A plain document as a JSON line; `question` and `worked_answer` are the same with its true trace,
    for `sft_mixed`.
    """
    answer = [OPEN, *problem.trace(), CLOSE, *document(problem)[-6:]]
    return {
        "text": " ".join(document(problem)),
        "answer": str(problem.answer),
        "depth": problem.depth,
        "question": " ".join([*first(problem), "it", "shows"]),
        "worked_answer": " ".join(answer),
    }


def write(
    out: str | Path,
    *,
    base: int = 200_000,
    train: int = 50_000,
    held_out: int = 1_200,
    seed: int = 0,
    mix: str = "f1",
    depths: Sequence[int] = (1, 2, 3, 4),
    held_out_depths: Sequence[int] = (1, 2, 3, 4, 5, 6),
) -> dict[str, Path]:
    """Make the corpus under `out`, as `dial.write` does: base.jsonl, train.jsonl, held_out.jsonl, and
    model/.
    """
    if mix not in MIXES:
        raise ValueError(f"unknown mix '{mix}': one of {', '.join(MIXES)}")
    kept_out, training = dial.apart(train, held_out, seed, depths, held_out_depths)
    documents: Iterator[str] = dial.base_documents(base, seed, MIXES[mix], FORMATS)
    return dial.save(
        Path(out),
        {
            "base": ({"text": t} for t in documents),
            "train": (record(p) for p in training),
            "held_out": (record(p) for p in kept_out),
        },
        WORDS,
    )


def tokenizer():
    """Its word-level tokenizer."""
    return dial.tokenizer(WORDS)


async def judge(prompts: Sequence[str]) -> list[str | None]:
    """An oracle for RLPT's judge: a prediction is right if it is a sentence of the dial and says the digit
    of the reference.
    """
    return [f"Score: {int(_says(pair['predicted'], pair['reference']))}" for pair in map(_pair, prompts)]


def _says(predicted: str, reference: str) -> bool:
    said, true = predicted.split(), reference.split()
    return len(said) >= 3 and said[:2] == ["it", "shows"] and said == true[: len(said)]


def _pair(prompt: str) -> dict[str, str]:
    """The pair of texts in a judge's prompt."""
    return json.loads(prompt[prompt.rindex('{"predicted"') :].strip())
