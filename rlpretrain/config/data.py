"""Section `data`: the documents of a run, from one place or from several named sources."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import field as _field
from dataclasses import fields, is_dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError

from rlpretrain.config.base import STRICT, Count, PathText, as_fields, as_text, headed
from rlpretrain.config.mixing import MixingConfig, check_names

SOURCE_NAME = re.compile(r"[A-Za-z0-9_.-]+")


def _read_weight(value: Any) -> Any:
    """A weight, or its points as tuples; one message for all that is neither."""
    given = value if isinstance(value, list | tuple) else [[0.0, value]]
    try:
        points = tuple((float(place), float(weight)) for place, weight in given)
    except (TypeError, ValueError):
        points = ()
    if not points or not all(0 <= place <= 1 and 0 <= weight < math.inf for place, weight in points):
        raise PydanticCustomError(
            "no_weight",
            "expected a number of at least 0, or points [[progress, weight], ...] with progress from 0 to 1",
        )
    return points if isinstance(value, list | tuple) else points[0][1]


Weight = Annotated[float | tuple[tuple[float, float], ...], BeforeValidator(_read_weight)]
"""A constant weight, or points (progress of the run, weight)."""


@dataclass(config=STRICT, kw_only=True)
class TextConfig:
    """Texts in any file or hub dataset that `datasets` reads, or documents of a source of your own."""

    path: PathText = ""
    """File (.txt, .jsonl, .json, .csv, .parquet), folder (all its files), glob, or hub id; required unless
    `source` is set. An existing name is literal.
    """
    name: str | None = None
    """Configuration name of a hub dataset."""
    split: str = "train"
    """Split to read."""
    column: str = "text"
    """Column with the text, or with the prompt where `answer_column` is set."""
    answer_column: str | None = None
    """Column with the answer to the prompt. A document is the prompt and then the answer; with `positions:
    answer` the thought is between them.
    """
    answer_join: str = "\n"
    """Text between prompt and answer; it belongs to the prompt."""
    score_column: str | None = None
    """Column with the scores of a text, for `objective: preference`: a number, or segments
    [[start, end, score], ...] in characters; higher is worse. A token has the score of the segment of its
    first character that is not white space.
    """
    max_length: Count = _field(default=2048)
    """Longest document in tokens; `long` says what happens to longer ones."""
    long: Literal["split", "truncate"] = "split"
    """Cut longer documents into several, or keep only their beginning."""
    append_eos: bool = True
    """End every document with the tokenizer's end-of-text token, if it has one."""
    shuffle: bool = True
    """Use a new seeded permutation in each epoch. Streams keep their order, since a shuffle buffer could not
    be resumed exactly.
    """
    order_by: str | None = None
    """Column of numbers by which documents come in ascending order, in every epoch; "-column" for descending.
    `shuffle` orders those with equal numbers.
    """
    streaming: bool = False
    """Read lazily instead of tokenising everything first."""
    meta_columns: tuple[str, ...] = ()
    """Other columns to keep beside the document (answers, difficulty)."""
    source: str | None = None
    """package.module:name of a document source of your own (rlpretrain/data/document_source.py); by default
    the texts of `path`. It gets this section, and decides which of its fields it uses.
    """
    options: dict[str, Any] = _field(default_factory=dict)
    """Settings of that source, as they are."""

    @model_validator(mode="before")
    @classmethod
    def _check_place(cls, given: Any) -> Any:
        """`path` may be missing, and `options` given, only with a `source`."""
        values = as_fields(given)
        if values.get("sources"):
            return given
        if values.get("source") is None and "path" not in values:
            raise PydanticCustomError("no_documents", "'path' is required, or a 'source' of your own")
        if values.get("source") is None and values.get("options"):
            raise PydanticCustomError("no_source", "'options' are those of a 'source', which is not set")
        if values.get("streaming") and values.get("order_by"):
            raise PydanticCustomError(
                "no_order", "'order_by' needs 'streaming: false': a stream is not sorted"
            )
        if values.get("score_column") and values.get("answer_column"):
            raise PydanticCustomError(
                "no_scores", "'score_column' has the scores of one text: it does not go with 'answer_column'"
            )
        return given


@dataclass(config=STRICT, kw_only=True)
class SourceConfig(TextConfig):
    """One of several sources of documents: its texts, its weight, and what the run does with them."""

    weight: Weight = 1.0
    """Its share among the weights of all sources; or points [progress of the run, weight], straight lines
    between them. Two points at one progress are a step. With `mixing`, up to its first update.
    """
    use: Literal["think", "read"] = "think"
    """think: the objective chooses positions in its documents. read: its documents are only read, for the
    next-token loss. An objective without positions reads all sources.
    """
    next_token: bool = True
    """Take the next-token loss of its documents."""
    exhausted: Literal["repeat", "stop", "renormalise"] = "repeat"
    """What follows its last pass. repeat: another one, without end. stop: the run ends with the step that
    needs another document of it. renormalise: the other sources take its share.
    """
    passes: Annotated[float, Field(gt=0)] | None = None
    """Passes over its documents before it is exhausted, 1 by default; not with `exhausted: repeat`."""

    @model_validator(mode="after")
    def _check(self) -> SourceConfig:
        """The points of the weight ascend; a document that nothing is done with is refused."""
        if self.use == "read" and not self.next_token:
            raise PydanticCustomError(
                "unused", "'next_token: false' leaves no use for a source with 'use: read'"
            )
        if self.passes is not None and self.exhausted == "repeat":
            raise PydanticCustomError(
                "endless", "'passes' needs 'exhausted: stop' or 'renormalise': a repeated source has no end"
            )
        if not isinstance(self.weight, tuple):
            return self
        places = [place for place, _ in self.weight]
        if places != sorted(places):
            raise PydanticCustomError(
                "overlapping", "the points of 'weight' overlap: their progress must not fall"
            )
        if any(places.count(place) > 2 for place in places):
            raise PydanticCustomError("overlapping", "'weight' has more than two points at one progress")
        return self

    def weight_at(self, progress: float) -> float:
        """The weight at a share of the run; at a step, that after it."""
        if not isinstance(self.weight, tuple):
            return self.weight
        before = [point for point in self.weight if point[0] <= progress]
        after = [point for point in self.weight if point[0] > progress]
        if not before or not after:
            return before[-1][1] if before else after[0][1]
        (left, low), (right, high) = before[-1], after[0]
        return low + (high - low) * (progress - left) / (right - left)

    @property
    def is_off(self) -> bool:
        """Whether its weight is 0 all the time."""
        weights = [weight for _, weight in self.weight] if isinstance(self.weight, tuple) else [self.weight]
        return not any(weights)

    def texts(self) -> DataConfig:
        """Its texts alone, as a section `data` has them."""
        return DataConfig(**{field.name: getattr(self, field.name) for field in fields(TextConfig)})


@dataclass(config=STRICT, kw_only=True)
class DataConfig(TextConfig):
    """The documents of a run: those of `path`, of a `source` of your own, or of several named `sources`."""

    sources: dict[str, SourceConfig] = _field(default_factory=dict)
    """Named sources that are mixed, in place of `path` (docs/mixtures.md). The other fields of this section
    are the defaults of each that is given as a mapping.
    """
    weights_count: Literal["tokens", "documents"] = "tokens"
    """What the weights of `sources` are shares of. Documents are drawn whole, so that a share of tokens is
    reached through the mean length of each source's documents.
    """
    mixing: Annotated[MixingConfig | None, headed("name")] = None
    """Shares of `sources` that follow their losses, in place of their weights."""

    @model_validator(mode="before")
    @classmethod
    def _fill_sources(cls, given: Any) -> Any:
        """Give each source the fields beside `sources` that it does not set."""
        values = as_fields(given)
        sources = values.get("sources")
        if not sources or not isinstance(sources, Mapping):
            return given
        for name in ("path", "source", "options"):
            if values.get(name):
                raise PydanticCustomError(
                    "two_places", "'{name}' stands beside 'sources': give it to one of them", {"name": name}
                )
        shared = {
            field.name: values[field.name]
            for field in fields(TextConfig)
            if field.name in values and field.name not in ("path", "source", "options")
        }
        filled = {name: _with_defaults(value, shared) for name, value in sources.items()}
        return {**values, "sources": filled}

    @model_validator(mode="after")
    def _check_sources(self) -> DataConfig:
        """Names that a metric can have, and weights that leave something to draw."""
        for name in self.sources:
            if not SOURCE_NAME.fullmatch(name):
                raise PydanticCustomError(
                    "bad_name",
                    "the source name '{name}' has other characters than letters, digits, '.', '_' and '-'",
                    {"name": name},
                )
        if self.mixing is not None:
            if not self.sources:
                raise PydanticCustomError("no_sources", "'mixing' is of 'sources', and there are none")
            check_names(self.mixing, self.sources)
        place = first_without_weight(list(self.sources.values()))
        if place is not None:
            raise PydanticCustomError(
                "no_weight", "the weights of 'sources' sum to 0 at progress {place}", {"place": place}
            )
        return self

    @property
    def longest(self) -> int:
        """`max_length`, or the largest of the sources."""
        return max((source.max_length for source in self.sources.values()), default=self.max_length)


def _with_defaults(source: Any, shared: Mapping[str, Any]) -> Any:
    """A source as given, with the fields that all sources share; a text is its path."""
    if is_dataclass(source):
        return source
    if isinstance(as_text(source), str):
        source = {"path": source}
    return {**shared, **source} if isinstance(source, Mapping) else source


def first_without_weight(sources: Sequence[SourceConfig]) -> float | None:
    """The first progress at which the weights of some sources sum to 0; None if there is none."""
    if not sources:
        return None
    points = {0.0, 1.0}
    for source in sources:
        if isinstance(source.weight, tuple):
            points |= {place for place, _ in source.weight}
    places = sorted(points)
    between = [(left + right) / 2 for left, right in itertools.pairwise(places)]
    for place in sorted([*places, *between]):
        if sum(source.weight_at(place) for source in sources) <= 0:
            return place
    return None
