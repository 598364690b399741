"""The graphs corpus: arithmetic on named quantities, where a program checks every step of a thought.

A clean-room testbed after "Interplay" (arXiv 2512.07783): what do pretraining, mid-training and RL each add
to reasoning? Difficulty is op, the exact number of operations; breadth is the context, one of two sets of
names. `write` makes

    base.jsonl       pretraining: mostly worked problems without thoughts; larger ops and context B are rare
    mid.jsonl        mid-training: gold traces as thoughts, at the edge of what the base can do
    train.jsonl      prompts and answers for RL (objective `verified`)
    sft.jsonl        the same prompts with gold traces: the control that RL has to exceed
    held_out.jsonl   by op and context, `cell` is both (A5); no problem of it is in another set
    corpus.json      settings, counts, and the check that nothing held out is in another set
    model/           surface `words` only: the tokenizer, and the configuration of a small model

See docs/graphs.md. `verify` is the verifier, which needs the question's text alone.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rlpretrain.corpora import dial
from rlpretrain.corpora.dial_formats import HMM
from rlpretrain.corpora.dial_problems import CLOSE, EOS, OPEN, PAD, UNK
from rlpretrain.corpora.graph_problems import CONTEXTS, OPERATIONS, Definition, Graph, GraphError
from rlpretrain.corpora.graph_sets import MIXES, Mix, Problem, Sets, Settings
from rlpretrain.corpora.graph_templates import DIGITS, Surface, split_words
from rlpretrain.corpora.graph_text import SURFACES, parse
from rlpretrain.corpora.graph_verifier import verify
from rlpretrain.corpora.writing import save_rows
from rlpretrain.files import dumps, writing

__all__ = [
    "CONTEXTS",
    "MIXES",
    "SURFACES",
    "WORDS",
    "Definition",
    "Graph",
    "GraphError",
    "Mix",
    "Settings",
    "parse",
    "tokenizer",
    "verify",
    "write",
]

_SYMBOLS = (PAD, EOS, UNK, OPEN, CLOSE, ".", ";", "=", "is", "ask", "so", *OPERATIONS, *DIGITS)
WORDS = tuple(dict.fromkeys((*_SYMBOLS, *itertools.chain(*CONTEXTS.values()), *HMM)))
"""The vocabulary of the surface `words`, in the order of token ids."""
_COPIED = (*DIGITS, *itertools.chain(*CONTEXTS.values()))
SPARE_TOKENS = 16
"""Tokens that the model of the corpus can read beyond the longest document."""


def tokenizer():
    """The word-level tokenizer of the surface `words`."""
    return dial.tokenizer(WORDS)


class Writer:
    """Turns problems into the rows of the files."""

    def __init__(self, settings: Settings):
        self.surface: Surface = SURFACES[settings.surface]
        self.says_plainly = settings.surface == "words"
        """One template for each clause, so nothing is drawn."""

    def question(self, problem: Problem, rng: random.Random) -> str:
        """The question's text."""
        return self.surface.question(problem.graph, None if self.says_plainly else rng)

    def worked_answer(self, problem: Problem, kind: str, rng: random.Random, slip: float = 0.0) -> str:
        """What a document of a kind says after the question; kinds are the fields of `Mix`.

        A step of its trace is wrong with probability `slip`; the answer is true.
        """
        answer = self.surface.answer_text(problem.graph)
        if kind == "direct":
            return answer
        if kind == "idle":
            return f"{OPEN} {' '.join(rng.choices(HMM, k=rng.randint(1, 5)))} {CLOSE} {answer}"
        values = problem.graph.slipped_values(rng, slip) if slip else None
        trace = self.surface.trace(problem.graph, None if self.says_plainly else rng, values)
        if kind == "worked":
            return self.surface.worked.format(trace=trace, answer=answer)
        return f"{OPEN} {trace} {CLOSE} {answer}"

    def document(self, problem: Problem, kind: str, rng: random.Random, slip: float = 0.0) -> dict[str, Any]:
        """A document of base.jsonl, mid.jsonl or sft.jsonl."""
        question, after = self.question(problem, rng), self.worked_answer(problem, kind, rng, slip)
        return self.row(question, after, kind, problem.op, problem.context)

    def copied(self, rng: random.Random) -> dict[str, Any]:
        """A document of random words, said twice."""
        words = " ".join(rng.choices(_COPIED, k=rng.randint(6, 14))) + self.surface.statement_end
        return self.row(words, words, "copied", 0, "")

    def prompt(self, problem: Problem, rng: random.Random) -> dict[str, Any]:
        """A row of train.jsonl or held_out.jsonl."""
        question, answer = self.question(problem, rng), self.surface.answer_text(problem.graph)
        distractors = len(problem.graph.definitions) - len(problem.graph.needed)
        return {
            "text": f"{question} {answer}",
            "question": question,
            "answer": answer,
            "op": problem.op,
            "context": problem.context,
            "cell": problem.cell,
            "distractors": distractors,
        }

    @staticmethod
    def row(question: str, after: str, kind: str, op: int, context: str) -> dict[str, Any]:
        """`text` is the whole document; `question` and `worked_answer` are its parts, joined by a space."""
        return {
            "text": f"{question} {after}",
            "question": question,
            "worked_answer": after,
            "kind": kind,
            "op": op,
            "context": context,
        }


@dataclass
class Count:
    """What was written into a file, read back from the texts of its rows."""

    rows: int = 0
    cells: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    answers: Counter[int] = field(default_factory=Counter)
    hashes: set[str] = field(default_factory=set)
    longest: int = 0
    """Words and punctuation of the longest row, which are the tokens of the surface `words`."""

    def add(self, row: dict[str, Any]) -> None:
        """Count a row."""
        self.rows += 1
        after = row.get("worked_answer", row.get("answer", ""))
        self.longest = max(self.longest, len(split_words(f"{row['question']} {after}")))
        self.kinds[row.get("kind", "prompt")] += 1
        if row["op"]:
            graph = parse(row["question"])
            self.cells[f"{row['context']}{graph.op}"] += 1
            self.answers[graph.answer] += 1
            self.hashes.add(graph.canonical_hash())

    def facts(self, held_out: set[str]) -> dict[str, Any]:
        """The counts for corpus.json."""
        problems = sum(self.cells.values())
        return {
            "rows": self.rows,
            "cells": dict(sorted(self.cells.items())),
            "kinds": dict(sorted(self.kinds.items())),
            "distinct_problems": len(self.hashes),
            "in_held_out": len(self.hashes & held_out),
            "longest_in_words": self.longest,
            "commonest_answer_frac": max(self.answers.values()) / problems if problems else None,
        }


def write(
    out: str | Path, settings: Settings | None = None, progress: Callable[[int, int], None] | None = None
) -> dict[str, Path]:
    """Write the corpus under `out`; the path of each file by name.

    `progress` is called with the numbers of documents done and of all. Raises ConfigError for settings that
    cannot be met: too few different problems, too few names, a folder that holds something else.
    """
    settings = settings or Settings()
    folder, sets, writer = Path(out), Sets(settings), Writer(settings)
    training = list(sets.train())
    files = {
        "held_out": _prompts(writer, sets.held_out, settings, "held_out"),
        "base": _base(writer, sets, settings),
        "mid": _traced(writer, sets.mid(), settings, "mid"),
        "train": _prompts(writer, training, settings, "train"),
        "sft": _traced(writer, training, settings, "train"),
    }
    counts = {name: Count() for name in files}
    total = settings.base + settings.mid + 2 * settings.train + len(sets.held_out)
    done = itertools.count(1)

    def counted(name: str, rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for row in rows:
            counts[name].add(row)
            if progress is not None:
                progress(next(done), total)
            yield row

    others = ("corpus.json", "model") if settings.surface == "words" else ("corpus.json",)
    paths = save_rows(folder, {name: counted(name, rows) for name, rows in files.items()}, others)
    held_out = counts["held_out"].hashes
    facts = {name: count.facts(held_out) for name, count in counts.items()}
    overlapping = [name for name in facts if name != "held_out" and facts[name]["in_held_out"]]
    if overlapping:
        raise RuntimeError(
            f"held-out problems are in {', '.join(overlapping)}: this is a fault of the generator"
        )
    paths["corpus"] = folder / "corpus.json"
    with writing(paths["corpus"]):
        temporary = folder / ".corpus.json.tmp"
        temporary.write_text(dumps({"settings": asdict(settings), "files": facts}, indent=2) + "\n")
        temporary.replace(paths["corpus"])
    if settings.surface == "words":
        longest = max(count.longest for count in counts.values())
        paths["model"] = _save_model(folder / "model", longest, settings.layers)
    return paths


def _base(writer: Writer, sets: Sets, settings: Settings) -> Iterator[dict[str, Any]]:
    """The rows of base.jsonl."""
    rng = random.Random(f"graphs base {settings.seed}")
    shares = asdict(MIXES[settings.mix])
    for _ in range(settings.base):
        (kind,) = rng.choices(list(shares), list(shares.values()))
        is_copied = kind == "copied"
        yield writer.copied(rng) if is_copied else writer.document(sets.base(rng), kind, rng, settings.slip)


def _traced(
    writer: Writer, problems: Iterator[Problem] | list[Problem], settings: Settings, name: str
) -> Iterator[dict[str, Any]]:
    """Problems with gold traces. Questions are said as in the file of prompts that has the same name."""
    for i, problem in enumerate(problems):
        yield writer.document(problem, "traced", random.Random(f"graphs {name} text {settings.seed} {i}"))


def _prompts(
    writer: Writer, problems: list[Problem], settings: Settings, name: str
) -> Iterator[dict[str, Any]]:
    for i, problem in enumerate(problems):
        yield writer.prompt(problem, random.Random(f"graphs {name} text {settings.seed} {i}"))


def _save_model(folder: Path, longest: int, layers: int) -> Path:
    """The tokenizer, and the configuration of a model that can read the longest document."""
    config = dial.model_config(WORDS, layers)
    config.max_position_embeddings = max(config.max_position_embeddings, longest + SPARE_TOKENS)
    tokenizer().save_pretrained(folder)
    config.save_pretrained(folder)
    return folder
