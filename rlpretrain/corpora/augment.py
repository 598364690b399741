"""Documents with generated thoughts in them, for next-token training: `rlpretrain augment`.

- `after`: a thought behind each document. Thinking-augmented pretraining (TPT), arXiv 2509.20186.
- `before`: a thought before the answer to a prompt, or before another place that the objective chooses.
- `inferable`: thoughts at places that are hard to predict, of each G the one that helps most to predict what
  follows, if it helps. After REER-PT, arXiv 2608.30627, whose abstract alone was known; the score is RLP's
  information gain under a frozen model, so this is RLP without training.

Trained with objective `ntp`. With no thought kept, the text is the source text and training is plain
next-token prediction. Everything random about a row depends on the seed and the row's number alone.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from rlpretrain.config import ConfigError, PretrainConfig
from rlpretrain.corpora.augment_parts import Plan, Samplers, load_samplers, make_plan
from rlpretrain.corpora.augment_summary import Summary
from rlpretrain.corpora.row_file import RowFile
from rlpretrain.corpora.text_places import Piece, RowText
from rlpretrain.corpora.thought_gains import with_gains
from rlpretrain.corpora.thought_texts import Candidate, Limits, ThoughtReader, choose, closed_group
from rlpretrain.rollouts.drawing import document_number
from rollout.blocking import wait_for_result
from rollout.types import Group, Position

Where = Literal["after", "before", "inferable"]
FIELDS = (
    "text",
    "row",
    "where",
    "thoughts",
    "generator",
    "seed",
    "places",
    "sampled",
    "dropped",
    "document_tokens",
    "thought_tokens",
)
"""The columns of every row; columns of the data that are kept may not have these names."""


@dataclass(frozen=True, slots=True)
class Place:
    """A place for a thought: a position of a piece, its character in the row's text, and a seed."""

    row: int
    piece: Piece
    position: Position
    cut: int
    seed: int


@dataclass(frozen=True, slots=True)
class Written:
    """A thought that is written into a row's text at a character of the source."""

    cut: int
    candidate: Candidate


def augment(
    config: PretrainConfig,
    out: Path,
    where: Where,
    limits: Limits,
    *,
    thoughts: int = 1,
    batch: int | None = None,
    chat: bool = False,
    fit_length: bool = False,
    progress: Callable[[int, int], None] | None = None,
    say: Callable[[str], None] = print,
) -> Summary:
    """Write the rows of `config.data` with thoughts to `out`; what is done already is kept.

    `config` names generator (`model`), data, places and prompt (`objective`), sampling, engine and, as
    `reference`, the scorer. `thoughts` are sampled at each place and at most one is kept. `batch` rows are
    written at a time. `chat` puts the objective's template into the tokenizer's chat template. With
    `fit_length`, `data.max_length` is lowered to what the model takes. `progress` gets the numbers of rows
    that are done now and that were to be done.

    Raises ConfigError before any weights are loaded for settings, data and files that cannot be used.
    """
    if taken := sorted(set(config.data.meta_columns) & set(FIELDS)):
        raise ConfigError(f"data.meta_columns: every row out has a column {taken[0]} of its own")
    plan = make_plan(config, where, thoughts, chat, fit_length)
    settings = _identity(plan.config, where, limits, thoughts, chat) | plan.size
    with closing(RowFile(out, settings, len(plan.rows))) as file:
        if file.done < file.total:
            _write_rows(plan, file, where, limits, batch, progress, say)
        summary = Summary.of(file.rows())
        if not file.is_complete:
            file.finish(asdict(summary))
    return summary


def _write_rows(
    plan: Plan,
    file: RowFile,
    where: Where,
    limits: Limits,
    batch: int | None,
    progress: Callable[[int, int], None] | None,
    say: Callable[[str], None],
) -> None:
    """Append the rows that are missing, batch by batch."""
    first = file.done
    if first:
        say(f"{first} of {file.total} rows are done: going on there")
    size = batch or max(1, plan.config.engine.batch_size // plan.thoughts)
    with ExitStack() as stack:
        samplers = load_samplers(plan, limits.min_gain is not None, stack, say)
        work = Augmenter(plan, samplers, where, limits)
        for begin in range(first, file.total, size):
            numbers = range(begin, min(begin + size, file.total))
            texts = list(plan.reader(plan.rows[numbers.start : numbers.stop], numbers))
            file.append(work.rows(texts))
            if progress is not None:
                progress(file.done - first, file.total - first)


class Augmenter:
    """Makes rows with thoughts of rows without."""

    def __init__(self, plan: Plan, samplers: Samplers, where: Where, limits: Limits):
        self.plan, self.samplers, self.where, self.limits = plan, samplers, where, limits
        self.objective = samplers.objective
        self.reader = ThoughtReader(self.objective, limits)

    def rows(self, texts: Sequence[RowText]) -> list[dict[str, Any]]:
        """The rows out, one for each of `texts`."""
        places = list(self._places(texts))
        written: list[list[Written]] = [[] for _ in texts]
        dropped: list[Counter[str]] = [Counter() for _ in texts]
        for place, candidates in zip(places, self._sample(places), strict=True):
            best, reasons = choose(candidates, self.limits)
            dropped[place.row] += reasons
            if best is not None:
                written[place.row].append(Written(place.cut, best))
        counts = Counter(place.row for place in places)
        return [self._row(text, counts[k], written[k], dropped[k]) for k, text in enumerate(texts)]

    def _places(self, texts: Sequence[RowText]) -> Iterator[Place]:
        """The places for thoughts, each character of a row once."""
        pieces = [(k, piece) for k, text in enumerate(texts) for piece in text.pieces]
        entropies: list[Any] = [None] * len(pieces)
        if pieces and self.where == "inferable" and "entropy" in self.objective.needs:
            assert self.samplers.scorer is not None, "places by entropy have a scorer"
            entropies = list(self.samplers.scorer.entropies([piece.document for _, piece in pieces]))
        taken = set[tuple[int, int]]()
        for (row, piece), trunk in zip(pieces, entropies, strict=True):
            for position, cut, seed in self._positions(piece, trunk):
                if (row, cut) not in taken:
                    taken.add((row, cut))
                    yield Place(row, piece, position, cut, seed)

    def _positions(self, piece: Piece, trunk: Any) -> Iterator[tuple[Position, int, int]]:
        """The positions of a piece with their characters and the seeds of their thoughts."""
        document = piece.document
        rng = np.random.default_rng((self.plan.config.seed, document_number(document.id)))
        if self.where == "after":
            ids = document.token_ids
            yield Position(document.id, len(ids), ids, ()), piece.end(), int(rng.integers(2**62))
            return
        if trunk is not None:
            inside = [i for i in range(1, len(trunk)) if piece.cut(i) is None]
            trunk = trunk.double().index_fill(0, torch.tensor(inside, dtype=torch.long), math.nan)
        for position in self.objective.positions(document, rng, trunk):
            seed, cut = int(rng.integers(2**62)), piece.cut(position.index)
            if cut is not None:
                yield position, cut, seed

    def _sample(self, places: Sequence[Place]) -> list[list[Candidate]]:
        """The candidates of each place, with gains where a gain is asked for."""
        if not places:
            return []
        positions = [place.position for place in places]
        prompts = [self.objective.prompt(position) for position in positions]
        seeds = [place.seed for place in places]
        sampling = self.objective.sample_thoughts(self.samplers.engine, positions, prompts, seeds)
        groups = wait_for_result(sampling)
        found = [
            [self.reader(thought, place.piece, place.position, place.cut) for thought in group.thoughts]
            for place, group in zip(places, groups, strict=True)
        ]
        return found if self.limits.min_gain is None else self._score(places, groups, found)

    def _score(
        self, places: Sequence[Place], groups: Sequence[Group], found: Sequence[list[Candidate]]
    ) -> list[list[Candidate]]:
        """The candidates with gains; those with a problem are not scored."""
        assert self.samplers.scorer is not None, "gains have a scorer"
        usable = [[c for c in of_place if c.problem is None] for of_place in found]
        scored = [k for k, of_place in enumerate(usable) if of_place]
        closed = [closed_group(groups[k], usable[k], self.reader.close) for k in scored]
        documents = [places[k].piece.document for k in scored]
        scores = self.samplers.scorer.gains(closed, documents) if scored else {}
        out = [list(of_place) for of_place in found]
        for k, group in zip(scored, closed, strict=True):
            problems = [c for c in found[k] if c.problem is not None]
            out[k] = [*with_gains(usable[k], scores[group.id]), *problems]
        return out

    def _row(
        self, source: RowText, places: int, written: list[Written], dropped: Counter[str]
    ) -> dict[str, Any]:
        """The row out of a row in."""
        written = sorted(written, key=lambda each: each.cut)
        parts, at = [], 0
        for each in written:
            parts += [source.text[at : each.cut], each.candidate.written]
            at = each.cut
        tokens = self.plan.tokenizer(source.text, add_special_tokens=False, verbose=False)["input_ids"]
        return {
            "text": "".join([*parts, source.text[at:]]),
            **source.columns,
            "row": source.row,
            "where": self.where,
            "thoughts": [each.candidate.record() | {"at": each.cut} for each in written],
            "generator": self.plan.generator,
            "seed": self.plan.config.seed,
            "places": places,
            "sampled": places * self.plan.thoughts,
            "dropped": dict(dropped),
            "document_tokens": len(tokens),
            "thought_tokens": sum(len(each.candidate.ids) + 2 for each in written),
        }


def _identity(
    config: PretrainConfig, where: Where, limits: Limits, thoughts: int, chat: bool
) -> dict[str, Any]:
    """The settings that the rows depend on."""
    engine = {name: getattr(config.engine, name, None) for name in ("name", "dtype", "of", "options")}
    sections = {name: asdict(getattr(config, name)) for name in ("model", "data", "sampling")}
    del sections["sampling"]["thoughts"]  # `thoughts`
    own = {"where": where, "thoughts": thoughts, "chat": chat, "limits": asdict(limits)}
    scorer = {"reference": asdict(config.reference)} if limits.min_gain is not None else {}
    rest = {"objective": config.objective, "engine": engine, "seed": config.seed}
    return own | sections | scorer | rest
