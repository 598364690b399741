"""Documents as a dataset of prompts for TRL."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from rlpretrain.config import ConfigError, DataConfig, as_text
from rlpretrain.data.stream import read_all
from rlpretrain.data.tokenization import DocumentSplitter
from rlpretrain.objectives import parse_section
from rlpretrain.prompts import Delimiters, ensure_delimiters
from rlpretrain.rollouts.drawing import DATA, prepare_document
from rlpretrain.trl.prompts import JUDGED, PromptWriter
from rlpretrain.types import Document
from rollout.types import Position

POSITION_COLUMNS = ("document_id", "position", "context_ids", "target_ids")
"""Columns of a prompt dataset that make a position. TRL hands them to reward functions unchanged."""
PROMPT_COLUMNS = ("prompt", *POSITION_COLUMNS, "suffix_ids")
"""All columns of a prompt dataset."""
COLUMNS = PROMPT_COLUMNS
"""The older name."""
LONGEST = 2048
"""Tokens of the longest document, by default."""


def to_prompt_dataset(
    documents: Any,
    tokenizer: Any,
    *,
    objective: Any = "rlp",
    column: str = "text",
    max_length: int = LONGEST,
    epochs: int = 1,
    seed: int = 0,
    whole: bool = False,
    keep: Sequence[str] = (),
    by_ids: bool = False,
    **settings: Any,
) -> Any:
    """Documents → a `datasets.Dataset` of prompts for TRL, a row for each position.

    `documents` is a path or hub id (as `data.path`), a `datasets.Dataset` with `column`, an
    `IterableDataset` with it (the result is one too), or a sequence of texts. With `epochs` above 1 every
    document gives new positions each time. `whole` adds the documents, for a next-token loss, and `keep`
    further columns of a dataset.

    TRL takes prompts as text and tokenises them again. Positions where that gives other ids than the
    document's are left out; a warning says how many (for a stream at its end). `RLPTrainer`, `Rollouts`
    and `AsyncRollouts` take the ids: with `by_ids`, which is for these alone, no position is left out.

    Raises ConfigError where no position is left, or nearly none, and for positions that need the live model
    (`entropy`).
    """
    import datasets

    if isinstance(objective, str):
        owner, config = parse_section({"name": objective, **settings})
        ensure_delimiters(tokenizer, None, Delimiters(config.open, config.close))
        objective = owner(config, tokenizer)
    elif settings:
        raise ConfigError(
            f"unknown settings: {', '.join(sorted(settings))}; known here: column, max_length, epochs, seed, "
            "whole, keep, by_ids"
        )
    if "entropy" in objective.needs:
        raise ConfigError(
            "positions of high entropy need the live model, and this dataset is made before training: take "
            "other positions, or a proxy model where the objective has one"
        )
    streamed = isinstance(documents, datasets.IterableDataset)

    def make_rows() -> Iterator[dict[str, Any]]:
        drawn, writer = 0, PromptWriter(tokenizer, by_ids)
        for _ in range(epochs):
            for given in _read_documents(documents, tokenizer, column, max_length, keep):
                document = prepare_document(objective, given, (seed, drawn, DATA))
                rng = np.random.default_rng((seed, drawn))
                drawn += 1
                if document is None:
                    continue
                more: dict[str, Any] = {name: (document.meta or {})[name] for name in keep}
                whole_document = {"document_token_ids": document.token_ids} if whole else {}
                for position in objective.positions(document, rng):
                    text = writer(position, objective.prompt(position).token_ids)
                    if streamed:
                        writer.check(JUDGED)
                    if text is not None:
                        yield more | _make_row(text, position) | whole_document
        writer.check()
        if writer.warning:
            warnings.warn(writer.warning, stacklevel=2)

    if streamed:
        return datasets.IterableDataset.from_generator(make_rows)
    rows = list(make_rows())
    if not rows:
        raise ConfigError("no document gives a prompt: this objective has no position in any")
    return datasets.Dataset.from_list(rows)


def _make_row(prompt: str, position: Position) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "document_id": position.document_id,
        "position": position.index,
        "context_ids": list(position.context_ids),
        "target_ids": list(position.target_ids),
        "suffix_ids": list(position.suffix_ids),
    }


def _read_documents(
    given: Any, tokenizer: Any, column: str, max_length: int, keep: Sequence[str]
) -> Iterable[Document]:
    if isinstance(given, Mapping):
        raise ConfigError(
            f"several datasets ({', '.join(map(str, given))}) where one is expected: give one of them"
        )
    given = as_text(given)
    if isinstance(given, str):
        if keep:
            raise ConfigError(
                "columns are kept of a dataset; of a path load it first: datasets.load_dataset(...)"
            )
        return read_all(DataConfig(path=given, column=column, max_length=max_length), tokenizer)
    columns: Sequence[str] = getattr(given, "column_names", None) or ()
    if columns and column not in columns:
        raise ConfigError(f"the dataset has no column '{column}': it has {', '.join(columns)}")
    if keep and not columns:
        raise ConfigError("columns are kept of a dataset that names its columns, not of texts")
    if missing := [name for name in keep if name not in columns]:
        raise ConfigError(
            f"keep: the dataset has no column {', '.join(missing)}: it has {', '.join(columns)}"
        )
    config = DataConfig(path="texts", column=column, max_length=max_length, meta_columns=tuple(keep))
    return _split_documents(given, DocumentSplitter(config, tokenizer, 2), column, bool(keep))


def _split_documents(
    rows: Iterable[str | dict[str, Any]], splitter: DocumentSplitter, column: str, with_columns: bool
) -> Iterator[Document]:
    """The documents of texts, or of rows with a text in `column`; their other columns go along if asked."""
    for i, row in enumerate(rows):
        text = row if isinstance(row, str) else row[column]
        values = row if with_columns and not isinstance(row, str) else {}
        (pieces,) = splitter.split({column: [text]}, [i])
        for k, piece in enumerate(pieces):
            if len(piece.token_ids) > 1:
                number = k if len(pieces) > 1 else None
                yield splitter.make_document(piece, i, number, values)
