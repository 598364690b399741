"""The dial corpus in every method's format, so that a small base model has read each of them.

A plain document has three sentences, `ann has 6 bob up3 cat times3 . it shows 7 . that is odd .`; the second
can be predicted from both sides. Beside prose, chains, worked and plain text, the base mix has documents of
the following formats, with thoughts that are mostly useless:

    think      a thought before the digit, inside the document                      rlp, likelihood
    sentence   a thought before the second sentence                                 rlpt, information gain
    box        `box` + text up to the digit, thought, `\\boxed{ 7 }`             rpt
    tell       `tell` + first sentence, thought, the second between delimiters      rlpt: match, judge
    fill       `fill` + first, a mask, third sentence, thought, the second          rlpt, middle segment
    hide       `hide` + the document, thought, a piece of it in `\\mask{ }`          pretrain_zero, generator
    find       `find` + the document with a piece masked, thought, `\\boxed{ }`      pretrain_zero, predictor

The first word stands for an instruction. `judge` is an oracle for RLPT, which knows the meaning of a
sentence.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlpretrain.corpora import dial
from rlpretrain.corpora.dial_formats import HMM, Formats, thought
from rlpretrain.corpora.dial_formats import Mix as DialMix
from rlpretrain.corpora.dial_problems import CLOSE, OPEN, Problem, draw, split_problems
from rlpretrain.corpora.dial_scored import scored_documents

MASK, HIDDEN = "<MASK>", "[mask]"
BOX, NAME, END = "\\boxed{", "\\mask{", "}"
SAY, SAID = "<|startofprediction|>", "<|endofprediction|>"
TASKS = ("box", "tell", "fill", "hide", "find")
WORDS = (*dial.WORDS, "it", "that", "is", "odd", "even", *TASKS, MASK, HIDDEN, BOX, NAME, END, SAY, SAID)


@dataclass(frozen=True, slots=True)
class Mix(DialMix):
    """Shares of all formats; depths and thoughts are set as in the dial's mixes."""

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
    """The documents of reinforcement pretraining."""
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
    prediction = second(problem)[2 : 3 if rng.random() < 0.8 else 4]
    return ["box", *first(problem), "it", "shows", OPEN, *words, CLOSE, BOX, *prediction, END]


def tell(rng: random.Random, mix: Mix) -> list[str]:
    """The second sentence between RLPT's delimiters."""
    problem, words = thought(rng, mix)
    return ["tell", *first(problem), OPEN, *words, CLOSE, SAY, *second(problem), SAID]


def fill(rng: random.Random, mix: Mix) -> list[str]:
    """The second sentence after the third: between delimiters, without them, or without a thought."""
    problem, words = thought(rng, mix)
    head = ["fill", *first(problem), MASK, *third(problem)]
    kind = rng.random()
    if kind < 0.25:
        return [*head, *second(problem)]
    prediction = second(problem) if kind < 0.5 else [SAY, *second(problem), SAID]
    return [*head, OPEN, *words, CLOSE, *prediction]


def piece(rng: random.Random, words: Sequence[str]) -> tuple[int, int]:
    """(start, stop) of a piece to hide: the answer, the last word, or one or two words anywhere."""
    kind = rng.random()
    if kind < 0.7:
        start = len(words) - (6 if kind < 0.5 else 2)
        return start, start + 1
    start = rng.randrange(len(words) - 1)
    return start, start + rng.choice((1, 1, 2))


def hide(rng: random.Random, mix: Mix) -> list[str]:
    """The document, then a piece of it to hide."""
    words = document(draw(rng, mix.think_depths))
    start, stop = piece(rng, words)
    idle = [rng.choice(HMM) for _ in range(rng.randint(1, 3))]
    return ["hide", *words, OPEN, *idle, CLOSE, NAME, *words[start:stop], END]


def find(rng: random.Random, mix: Mix) -> list[str]:
    """A document with a hidden piece, then the piece."""
    problem, thought_words = thought(rng, mix)
    words = document(problem)
    start, stop = piece(rng, words)
    question = ["find", *words[:start], HIDDEN, *words[stop:]]
    return [*question, OPEN, *thought_words, CLOSE, BOX, *words[start:stop], END]


FORMATS: Formats = {
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
    """A plain document as a JSON line; `sft_mixed` reads its `question` and `worked_answer`."""
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
    """Write base.jsonl, train.jsonl, held_out.jsonl and model/ under `out`, as `dial.write` does.

    scored.jsonl has worked problems, as many as train.jsonl, with wrong steps and the scores of their
    sentences; scored_held_out.jsonl has the held-out problems, without wrong steps.
    """
    if mix not in MIXES:
        raise ValueError(f"unknown mix '{mix}': one of {', '.join(MIXES)}")
    held_out_problems, training = split_problems(train, held_out, seed, depths, held_out_depths)
    _, worked = split_problems(train, held_out, seed, depths, held_out_depths)
    files = {
        "base": ({"text": text} for text in dial.base_documents(base, seed, MIXES[mix], FORMATS)),
        "train": (record(problem) for problem in training),
        "held_out": (record(problem) for problem in held_out_problems),
        "scored": scored_documents(iter(worked), seed),
        "scored_held_out": scored_documents(iter(held_out_problems), seed, slip=0.0),
    }
    return dial.save(Path(out), files, WORDS)


def tokenizer():
    """The word-level tokenizer of this corpus."""
    return dial.tokenizer(WORDS)


async def judge(prompts: Sequence[str]) -> list[str | None]:
    """An oracle for RLPT's judge: a prediction is right if it names the digit of the reference."""
    pairs = [_texts_of(prompt) for prompt in prompts]
    return [f"Score: {int(_is_right(pair['predicted'], pair['reference']))}" for pair in pairs]


def _is_right(predicted: str, reference: str) -> bool:
    """Whether a prediction is a prefix of the reference, at least up to its digit."""
    words, true_words = predicted.split(), reference.split()
    return len(words) >= 3 and words[:2] == ["it", "shows"] and words == true_words[: len(words)]


def _texts_of(prompt: str) -> dict[str, str]:
    """The predicted and the reference text in a judge's prompt."""
    return json.loads(prompt[prompt.rindex('{"predicted"') :].strip())
