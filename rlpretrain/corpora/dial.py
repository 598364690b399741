"""The dial: arithmetic on one digit, passed from hand to hand, where thinking pays and every thought can be
checked.

A plain document is `ann has 6 bob up3 cat times3 shows 7 .`: a start digit, then one operation a person,
modulo 10, then the answer. Depth k is the number of operations. Its trace, the thought that computes the
answer, is `6 bob up3 9 cat times3 7`. A base mix also holds running chains, worked text, and documents with a
thought before the answer, half of them useless, so that a small model pretrained on it can think but mostly
does not bother: what reinforcement pretraining has to change. Steps of given traces slip now and then while
the answer after them stays true; without such noise a reader trusts any trace, and a wrong one then costs far
more than a right one earns.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlpretrain.config import ConfigError
from rlpretrain.files import check_writable, writing
from rollout.folders import MARK

OPERATIONS: Mapping[str, Callable[[int], int]] = {
    "up1": lambda d: (d + 1) % 10,
    "up2": lambda d: (d + 2) % 10,
    "up3": lambda d: (d + 3) % 10,
    "down1": lambda d: (d - 1) % 10,
    "down2": lambda d: (d - 2) % 10,
    "times3": lambda d: (d * 3) % 10,
}
NAMES = ("ann", "bob", "cat", "dan", "eve", "fay", "gus", "hal", "ida", "jon", "kim", "leo")
HMM = ("hmm", "well", "maybe", "wait", "so")
PROSE = [
    "the",
    "old",
    "the",
    "quiet",
    "a",
    "small",
    "river",
    "town",
    "harbour",
    "market",
    "garden",
    "winter",
    "morning",
    "evening",
    "light",
    "rain",
    "wind",
    "road",
    "bridge",
    "boat",
    "letter",
    "story",
    "teacher",
    "farmer",
    "sailor",
    "child",
    "walked",
    "looked",
    "waited",
    "sang",
    "slept",
    "across",
    "under",
    "along",
    "toward",
    "with",
    "and",
    "then",
]
OPEN, CLOSE, EOS, PAD, UNK = "<think>", "</think>", "<eos>", "<pad>", "<unk>"
WORDS = tuple(
    dict.fromkeys(
        [
            PAD,
            EOS,
            UNK,
            OPEN,
            CLOSE,
            ".",
            "has",
            "shows",
            *map(str, range(10)),
            *OPERATIONS,
            *NAMES,
            *HMM,
            *PROSE,
        ]
    )
)


@dataclass(frozen=True, slots=True)
class Problem:
    """A start digit and a chain of operations, passed along the names from `first` on."""

    first: int
    start: int
    operations: tuple[str, ...]

    @property
    def depth(self) -> int:
        return len(self.operations)

    def steps(self) -> Iterator[tuple[str, str, int]]:
        """(name, operation, value after it) of each step."""
        value = self.start
        for i, op in enumerate(self.operations):
            value = OPERATIONS[op](value)
            yield NAMES[(self.first + 1 + i) % len(NAMES)], op, value

    @property
    def answer(self) -> int:
        return list(self.steps())[-1][2]

    def question(self) -> list[str]:
        """`ann has 6 bob up3 cat times3`."""
        return [NAMES[self.first], "has", str(self.start), *(w for n, op, _ in self.steps() for w in (n, op))]

    def trace(self, rng: random.Random | None = None, slip: float = 0.0) -> list[str]:
        """`6 bob up3 9 cat times3 7`; each step goes wrong with probability `slip` and is then carried on
        from there.
        """
        words, value = [str(self.start)], self.start
        for name, op, _ in self.steps():
            if rng is not None and rng.random() < slip:
                if rng.random() < 0.5:
                    op = rng.choice([o for o in OPERATIONS if o != op])
                    value = OPERATIONS[op](value)
                else:
                    value = (OPERATIONS[op](value) + rng.randrange(1, 10)) % 10
            else:
                value = OPERATIONS[op](value)
            words += [name, op, str(value)]
        return words


@dataclass(frozen=True, slots=True)
class Mix:
    """Shares of the document formats in a base corpus, and what stands inside its thoughts."""

    prose: float = 0.05
    chain: float = 0.15
    worked: float = 0.35
    think: float = 0.15
    plain: float = 0.30
    full_trace: float = 0.40
    part_trace: float = 0.10  # the rest of the thoughts is useless
    slip: float = 0.07
    worked_depths: tuple[int, int] = (1, 4)
    think_depths: tuple[int, int] = (1, 3)
    plain_depths: tuple[int, int] = (1, 6)
    refrain: float = 0.0  # share of the prose that is said twice
    deep: float = 0.0  # share of the thoughts that belong to problems of `deep_depths`
    deep_depths: tuple[int, int] = (5, 6)


MIXES = {
    "b9": Mix(),
    "d1": Mix(0.05, 0.10, 0.40, 0.20, 0.25, full_trace=0.30, part_trace=0.05),
    "s20": Mix(0.05, 0.15, 0.35, 0.20, 0.25),
    "c4": Mix(worked_depths=(1, 6), think_depths=(1, 4)),
    "c6": Mix(
        0.05,
        0.10,
        0.40,
        0.20,
        0.25,
        full_trace=0.20,
        part_trace=0.05,
        worked_depths=(1, 6),
        think_depths=(1, 4),
        deep=0.05,
    ),
    "c8": Mix(
        0.10,
        0.10,
        0.38,
        0.12,
        0.30,
        full_trace=0.25,
        part_trace=0.05,
        worked_depths=(1, 6),
        think_depths=(1, 4),
        deep=0.05,
        refrain=1.0,
    ),
    "c7": Mix(
        0.05,
        0.10,
        0.40,
        0.12,
        0.33,
        full_trace=0.25,
        part_trace=0.05,
        worked_depths=(1, 6),
        think_depths=(1, 4),
        deep=0.05,
    ),
}


def draw(rng: random.Random, depths: tuple[int, int]) -> Problem:
    """A random problem of a depth between the two, both included."""
    operations = tuple(rng.choice(list(OPERATIONS)) for _ in range(rng.randint(*depths)))
    return Problem(rng.randrange(len(NAMES)), rng.randrange(10), operations)


def prose(rng: random.Random, mix: Mix) -> list[str]:
    """Words without meaning; with a refrain, said twice: what teaches a small model to look back and copy."""
    words = [*(rng.choice(PROSE) for _ in range(rng.randint(6, 14))), "."]
    return words + words if rng.random() < mix.refrain else words


def chain(rng: random.Random, mix: Mix) -> list[str]:
    """A running chain: every value is said as it arises, nothing is asked."""
    problem = draw(rng, (4, 4))
    return [NAMES[problem.first], "has", *problem.trace(rng, mix.slip), "."]


def worked(rng: random.Random, mix: Mix) -> list[str]:
    """A problem worked in the open, without delimiters."""
    problem = draw(rng, mix.worked_depths)
    return [*problem.question(), ".", "so", *problem.trace(rng, mix.slip), "."]


def think(rng: random.Random, mix: Mix) -> list[str]:
    """A problem with a thought before its answer: a full trace, a part of one, or useless words."""
    problem, words = thought(rng, mix)
    return [*problem.question(), "shows", OPEN, *words, CLOSE, str(problem.answer), "."]


def thought(rng: random.Random, mix: Mix) -> tuple[Problem, list[str]]:
    """A problem, and what somebody thinks about it."""
    deep = mix.deep > 0 and rng.random() < mix.deep
    problem, u = draw(rng, mix.deep_depths if deep else mix.think_depths), rng.random()
    if u < mix.full_trace:
        return problem, problem.trace(rng, mix.slip)
    if u < mix.full_trace + mix.part_trace:
        full = problem.trace(rng, mix.slip)
        return problem, full[: rng.randrange(1, len(full))]
    return problem, [rng.choice(HMM) for _ in range(rng.randint(1, 5))]


def plain(rng: random.Random, mix: Mix) -> list[str]:
    """A problem and its answer: what reinforcement pretraining sees."""
    problem = draw(rng, mix.plain_depths)
    return [*problem.question(), "shows", str(problem.answer), "."]


Formats = Mapping[str, Callable[[random.Random, Any], list[str]]]
FORMATS: Formats = {"prose": prose, "chain": chain, "worked": worked, "think": think, "plain": plain}
"""Document formats of a base mix; the share of each is the field of `Mix` with its name."""


def base_documents(count: int, seed: int, mix: Mix, formats: Formats = FORMATS) -> Iterator[str]:
    """`count` documents of a base mix."""
    rng = random.Random(f"dial base {seed}")
    names = list(formats)
    for kind in rng.choices(names, [getattr(mix, n) for n in names], k=count):
        yield " ".join(formats[kind](rng, mix))


def problems(count: int, seed: int, depths: Sequence[int], role: str) -> Iterator[Problem]:
    """`count` random problems with the depths in turn; `role` (train, held_out) keeps the streams apart."""
    rng = random.Random(f"dial {role} {seed}")
    for i in range(count):
        depth = depths[i % len(depths)]
        yield draw(rng, (depth, depth))


def record(problem: Problem) -> dict[str, Any]:
    """A plain document as a JSON line: text, and what is needed to check an answer and a thought."""
    return {
        "text": " ".join([*problem.question(), "shows", str(problem.answer), "."]),
        "answer": str(problem.answer),
        "depth": problem.depth,
        "trace": " ".join(problem.trace()),
    }


def verify(trace: str, thought: str) -> tuple[bool, float]:
    """Whether a thought is exactly the true trace, and the share of the trace's words it gets right before
    the first error.
    """
    gold, said = trace.split(), thought.replace(CLOSE, "").split()
    right = 0
    for a, b in zip(gold, said, strict=False):
        if a != b:
            break
        right += 1
    return gold == said, right / len(gold)


def tokenizer(words: Sequence[str] = WORDS):
    """The word-level tokenizer of a dial corpus as a Hugging Face tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token=UNK))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        unk_token=UNK,
        pad_token=PAD,
        eos_token=EOS,
        additional_special_tokens=[OPEN, CLOSE],
        clean_up_tokenization_spaces=False,
    )


def model_config(words: Sequence[str] = WORDS):
    """The small Qwen3 that learns a dial corpus on one CPU thread (340 thousand parameters)."""
    from transformers import Qwen3Config

    return Qwen3Config(
        vocab_size=len(words),
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        intermediate_size=256,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=words.index(PAD),
        eos_token_id=words.index(EOS),
        bos_token_id=None,
        attention_dropout=0.0,
    )


def write(
    out: str | Path,
    *,
    base: int = 200_000,
    train: int = 50_000,
    held_out: int = 1_200,
    seed: int = 0,
    mix: str = "c8",
    depths: Sequence[int] = (1, 2, 3, 4),
    held_out_depths: Sequence[int] = (1, 2, 3, 4, 5, 6),
) -> dict[str, Path]:
    """Make the corpus under `out`: base.jsonl, train.jsonl, held_out.jsonl, and model/ (tokenizer and
    configuration).

    Held-out problems are never equal to a training problem of the same call; base documents may repeat
    either, as they would in any crawl. Raises ValueError for an unknown mix.
    """
    if mix not in MIXES:
        raise ValueError(f"unknown mix '{mix}': one of {', '.join(MIXES)}")
    kept_out, training = apart(train, held_out, seed, depths, held_out_depths)
    return save(
        Path(out),
        {
            "base": ({"text": t} for t in base_documents(base, seed, MIXES[mix])),
            "train": (record(p) for p in training),
            "held_out": (record(p) for p in kept_out),
        },
        WORDS,
    )


def apart(
    train: int, held_out: int, seed: int, depths: Sequence[int], held_out_depths: Sequence[int]
) -> tuple[list[Problem], Iterator[Problem]]:
    """(held-out problems, training problems), none of them in both."""
    kept_out = list(problems(held_out, seed, held_out_depths, "held_out"))
    seen = {p for p in kept_out if p.depth > 2}  # depths 1 and 2 are too few to keep apart
    return kept_out, (p for p in problems(train, seed, depths, "train") if p not in seen)


def save(
    folder: Path, files: Mapping[str, Iterator[dict[str, Any]]], words: Sequence[str]
) -> dict[str, Path]:
    """Write each of `files` as NAME.jsonl, and model/ with the tokenizer of `words` and the small model's
    configuration.
    """
    names = ["model", *(f"{name}.jsonl" for name in files)]
    there = next((folder / name for name in names if (folder / name).exists()), None)
    if there and not (folder / MARK).is_file():
        raise ConfigError(
            f"{there} is there already and no corpus that rlpretrain made: choose another folder"
        )
    check_writable(folder, "the corpus folder")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).touch()
    paths = {}
    for name, rows in files.items():
        paths[name] = folder / f"{name}.jsonl"
        temporary = folder / f".{name}.jsonl.tmp"
        with writing(paths[name]), temporary.open("w") as f:
            f.writelines(json.dumps(row) + "\n" for row in rows)
        temporary.replace(paths[name])
    tokenizer(words).save_pretrained(folder / "model")
    model_config(words).save_pretrained(folder / "model")
    paths["model"] = folder / "model"
    return paths


def trace_skill(
    model: Any,
    tokenizer: Any,
    *,
    depths: tuple[int, int] = (1, 4),
    count: int = 200,
    seed: int = 0,
    before: Sequence[str] = (),
    after: Sequence[str] = ("shows",),
) -> float:
    """Teacher-forced skill in true traces, 0 to 1: can the model compute if it tries?

    A trace stands behind the words `before`, the question, the words `after` it, and the open tag.

    The lowest of three accuracies, since a chain is as strong as its weakest link: the start digit, copied
    from the question (judged among the digits, a thought may also begin otherwise); the operations, copied;
    the values, computed. The gate of base pretraining: a base that cannot do one of them has no right thought
    to reinforce, in some problems or in all.
    """
    import torch

    right = {"start": 0, "operation": 0, "value": 0}
    asked = dict.fromkeys(right, 0)
    device = next(model.parameters()).device
    digits = torch.tensor(tokenizer.convert_tokens_to_ids([str(d) for d in range(10)]), device=device)
    with torch.no_grad():
        for problem in problems(count, seed, range(depths[0], depths[1] + 1), "skill"):
            head, trace = [*before, *problem.question(), *after, OPEN], problem.trace()
            ids = torch.tensor([tokenizer.convert_tokens_to_ids(head + trace)], device=device)
            logits = model(input_ids=ids).logits[0]
            said = logits.argmax(-1)
            said[len(head) - 1] = digits[logits[len(head) - 1, digits].argmax()]
            kinds = ["start", *("name", "operation", "value") * problem.depth]
            for at, kind in enumerate(kinds, len(head)):
                if kind in right:
                    asked[kind] += 1
                    right[kind] += int(said[at - 1] == ids[0, at])
    return min(right[kind] / asked[kind] for kind in right)
