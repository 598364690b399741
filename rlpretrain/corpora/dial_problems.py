"""Problems of the dial corpus: a digit, operations on it modulo 10, and the trace of the answer."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

OPERATIONS: Mapping[str, Callable[[int], int]] = {
    "up1": lambda digit: (digit + 1) % 10,
    "up2": lambda digit: (digit + 2) % 10,
    "up3": lambda digit: (digit + 3) % 10,
    "down1": lambda digit: (digit - 1) % 10,
    "down2": lambda digit: (digit - 2) % 10,
    "times3": lambda digit: (digit * 3) % 10,
}
NAMES = tuple(["ann", "bob", "cat", "dan", "eve", "fay", "gus", "hal", "ida", "jon", "kim", "leo"])
OPEN, CLOSE, EOS, PAD, UNK = "<think>", "</think>", "<eos>", "<pad>", "<unk>"


@dataclass(frozen=True, slots=True)
class Problem:
    """A start digit and a chain of operations, passed along the names from `first` on."""

    first: int
    start: int
    operations: tuple[str, ...]

    @property
    def depth(self) -> int:
        """Number of operations."""
        return len(self.operations)

    def steps(self) -> Iterator[tuple[str, str, int]]:
        """(name, operation, value after it) of each step."""
        value = self.start
        for i, operation in enumerate(self.operations):
            value = OPERATIONS[operation](value)
            yield NAMES[(self.first + 1 + i) % len(NAMES)], operation, value

    @property
    def answer(self) -> int:
        """The value after the last step."""
        return list(self.steps())[-1][2]

    def question(self) -> list[str]:
        """`ann has 6 bob up3 cat times3`."""
        words = [NAMES[self.first], "has", str(self.start)]
        for name, operation, _ in self.steps():
            words += [name, operation]
        return words

    def trace(self, rng: random.Random | None = None, slip: float = 0.0) -> list[str]:
        """`6 bob up3 9 cat times3 7`; a step is wrong with probability `slip`, and the next builds on it."""
        words, value = [str(self.start)], self.start
        for name, operation, _ in self.steps():
            slips = rng is not None and rng.random() < slip
            if rng is None or not slips:
                value = OPERATIONS[operation](value)
            elif rng.random() < 0.5:  # another operation
                operation = rng.choice([other for other in OPERATIONS if other != operation])
                value = OPERATIONS[operation](value)
            else:  # a wrong value
                value = (OPERATIONS[operation](value) + rng.randrange(1, 10)) % 10
            words += [name, operation, str(value)]
        return words


def draw(rng: random.Random, depths: tuple[int, int]) -> Problem:
    """A random problem whose depth is in a range, both ends included."""
    operations = tuple(rng.choice(list(OPERATIONS)) for _ in range(rng.randint(*depths)))
    return Problem(rng.randrange(len(NAMES)), rng.randrange(10), operations)


def problems(count: int, seed: int, depths: Sequence[int], role: str) -> Iterator[Problem]:
    """`count` random problems with the depths in turn; each `role` (train, held_out) has its own stream."""
    rng = random.Random(f"dial {role} {seed}")
    for i in range(count):
        depth = depths[i % len(depths)]
        yield draw(rng, (depth, depth))


def split_problems(
    train: int, held_out: int, seed: int, depths: Sequence[int], held_out_depths: Sequence[int]
) -> tuple[list[Problem], Iterator[Problem]]:
    """(held-out problems, training problems). No problem is in both, except those of depths 1 and 2."""
    held_out_problems = list(problems(held_out, seed, held_out_depths, "held_out"))
    excluded = {problem for problem in held_out_problems if problem.depth > 2}  # depths 1 and 2 have too few
    training = (problem for problem in problems(train, seed, depths, "train") if problem not in excluded)
    return held_out_problems, training


def verify(trace: str, thought: str) -> tuple[bool, float]:
    """Whether a thought is exactly the true trace, and the share of the trace before its first wrong word."""
    true_words, words = trace.split(), thought.replace(CLOSE, "").split()
    right = 0
    for true_word, word in zip(true_words, words, strict=False):
        if word != true_word:
            break
        right += 1
    return words == true_words, right / len(true_words)
