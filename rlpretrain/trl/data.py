"""What TRL trains from: documents as a dataset of prompts, and for its command line a checkpoint that is
ready for thoughts.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from rlpretrain import models
from rlpretrain.config import ConfigError, DataConfig, ModelConfig
from rlpretrain.data.stream import read_all
from rlpretrain.data.tokenization import DocumentSplitter
from rlpretrain.files import check_writable
from rlpretrain.objectives import Config, delimiters, parse_section
from rlpretrain.prompts import Delimiters, ensure_delimiters
from rlpretrain.rollouts.drawing import DATA, prepare_document
from rlpretrain.trl.prompts import JUDGED, PromptWriter
from rlpretrain.types import Document

COLUMNS = ("prompt", "document_id", "position", "context_ids", "target_ids", "suffix_ids")
"""Of a prompt dataset; TRL hands all but the first to reward functions as they are."""
LONGEST = 2048
"""Tokens of the longest document, by default."""
SECTION = "objective"
"""Column of prepared prompts: the objective section they were made with, as JSON, the same in every row."""


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

    `documents` is a path or hub id (as `data.path`), a `datasets.Dataset` or `IterableDataset` (stays one)
    with `column`, or a sequence of texts. With `epochs` above 1 every document gives new positions each time;
    `whole` adds the documents, for a next-token loss, and `keep` further columns of a dataset.

    TRL takes prompts as text and tokenises them again; positions where that gives other ids than the
    document's are left out, and how many is said in a warning (of a stream at its end). `RLPTrainer`,
    `Rollouts` and `AsyncRollouts` take the ids: with `by_ids`, for these alone, no position is left out.

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
            "positions of high entropy need the live model, which a dataset made beforehand has not: take "
            "others, or a proxy model where the objective has one"
        )
    streamed = isinstance(documents, datasets.IterableDataset)

    def rows() -> Iterator[dict[str, Any]]:
        i, write = 0, PromptWriter(tokenizer, by_ids)
        for _ in range(epochs):
            for given in _documents(documents, tokenizer, column, max_length, keep):
                document = prepare_document(objective, given, (seed, i, DATA))
                rng = np.random.default_rng((seed, i))
                i += 1
                if document is None:
                    continue
                for p in objective.positions(document, rng):
                    text = write(p, objective.prompt(p).token_ids)
                    if streamed:
                        write.check(JUDGED)
                    if text is None:
                        continue
                    values = (
                        text,
                        p.document_id,
                        p.index,
                        list(p.context_ids),
                        list(p.target_ids),
                        list(p.suffix_ids),
                    )
                    row = {name: (document.meta or {})[name] for name in keep} | dict(
                        zip(COLUMNS, values, strict=True)
                    )
                    yield row | ({"document_token_ids": document.token_ids} if whole else {})
        write.check()
        if write.warning:
            warnings.warn(write.warning, stacklevel=2)

    if streamed:
        return datasets.IterableDataset.from_generator(rows)
    found = list(rows())
    if not found:
        raise ConfigError("no document gives a prompt: this objective has no position in any")
    return datasets.Dataset.from_list(found)


def _documents(
    given: Any, tokenizer: Any, column: str, max_length: int, keep: Sequence[str]
) -> Iterable[Document]:
    if isinstance(given, Mapping):
        raise ConfigError(
            f"several datasets ({', '.join(map(str, given))}) where one is expected: give one of them"
        )
    if isinstance(given, str):
        if keep:
            raise ConfigError(
                "columns are kept of a dataset; of a path load it first: datasets.load_dataset(...)"
            )
        return read_all(DataConfig(path=given, column=column, max_length=max_length), tokenizer)
    known = getattr(given, "column_names", None)
    if known and column not in known:
        raise ConfigError(f"the dataset has no column '{column}': it has {', '.join(known)}")
    if keep and not known:
        raise ConfigError("columns are kept of a dataset that names its columns, not of texts")
    if missing := [name for name in keep if name not in known]:
        raise ConfigError(f"keep: the dataset has no column {', '.join(missing)}: it has {', '.join(known)}")
    splitter = DocumentSplitter(
        DataConfig(path="texts", column=column, max_length=max_length, meta_columns=tuple(keep)), tokenizer, 2
    )

    def split() -> Iterator[Document]:
        for i, row in enumerate(given):
            (pieces,) = splitter.split({column: [row if isinstance(row, str) else row[column]]}, [i])
            for k, piece in enumerate(pieces):
                if len(piece.token_ids) > 1:
                    number = k if len(pieces) > 1 else None
                    values = {} if isinstance(row, str) or not keep else row
                    yield splitter.make_document(piece, i, number, values)

    return split()


def end_with_thought(model: Any, close_id: int) -> None:
    """Make the close tag an end of generation, which TRL reads from the model."""
    known = ends_of(model)
    if close_id not in known:
        model.generation_config.eos_token_id = [*known, close_id]


def ends_of(model: Any) -> list[int]:
    """The tokens that end a generation of this model."""
    known = model.generation_config.eos_token_id
    return [known] if isinstance(known, int) else list(known or [])


def prepare(
    config: ModelConfig,
    out: str | Path,
    section: Mapping[str, Any],
    documents: Mapping[str, str],
    *,
    seed: int = 0,
    **settings: Any,
) -> dict[str, Any]:
    """Write what TRL's scripts take from disk: `out/model`, which knows the tags of a thought and ends
    generations with it, and `out/prompts`, a parquet file for each split of `documents` (split → path or hub
    id).

    `settings` are those of `to_prompt_dataset`. Returns the number of prompts of each split, and `added`, the
    tags that are new to the model. Raises ConfigError where `out` holds one of the two already.
    """
    out, section = Path(out), {"name": "rlp", **section}
    if there := next((out / n for n in ("model", "prompts") if (out / n).exists()), None):
        raise ConfigError(f"{there} exists already: remove it, or choose another folder")
    check_writable(out, "--out")
    if (tags := delimiters(section)) is None:
        raise ConfigError(f"objective {section['name']} has no thoughts to prepare for")
    model, tokenizer, added = models.load_with_tokenizer(config, tags, seed)
    models.try_saving(model, tokenizer, config)
    owner, parsed = parse_section(section)
    objective = owner(parsed, tokenizer)
    prompts = {
        split: to_prompt_dataset(path, tokenizer, objective=objective, seed=seed, **settings)
        for split, path in documents.items()
    }
    if not objective.answer_tokens:
        end_with_thought(model, objective.template.close_id)
    work = out / ".prompts.tmp"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    for split, rows in prompts.items():
        rows.add_column(SECTION, [json.dumps(section)] * len(rows)).to_parquet(work / f"{split}.parquet")
    models.save_start(model, tokenizer, out / "model")
    work.replace(out / "prompts")
    return {"added": added} | {split: len(rows) for split, rows in prompts.items()}


def fields_of_prompts(columns: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What the objective `name` takes over from the section that prompts were prepared with: all if it is its
    own, else what every objective has (template, tags, ...).
    """
    section = json.loads(columns[SECTION][0]) if SECTION in columns else {}
    if section.pop("name", name) == name:
        return section
    return {field.name: section[field.name] for field in fields(Config) if field.name in section}


def check_tags(model: Any, tokenizer: Any, section: Mapping[str, Any]) -> None:
    """Raises ConfigError for a model that lacks the tags of a thought, once it is too late to add them."""
    known, rows = tokenizer.get_vocab(), model.config.get_text_config().vocab_size
    tags = delimiters(section) or Delimiters()
    for tag in (tags.open, tags.close):
        if known.get(tag, rows) >= rows:
            raise ConfigError(
                f"the checkpoint does not know {tag}, and here it can no longer be taught: {_remedy(section)}"
            )


def check_end(model: Any, objective: Any, section: Mapping[str, Any]) -> None:
    """Raises ConfigError where generations do not end as the objective wants: at the close tag, or after a
    prediction.
    """
    tag, ends = objective.config.close, objective.template.close_id in ends_of(model)
    if ends and objective.answer_tokens:
        raise ConfigError(
            f"{tag} ends a generation of this checkpoint, and the objective wants a prediction after it: "
            f"{_remedy(section)}"
        )
    if not ends and not objective.answer_tokens:
        raise ConfigError(
            f"{tag} does not end a generation of this checkpoint (generation_config.json, eos_token_id): "
            f"{_remedy(section)}"
        )


def _remedy(section: Mapping[str, Any]) -> str:
    return (
        f"make a checkpoint by `rlpretrain prepare MODEL --out DIR --data FILE --objective "
        f"'{json.dumps(dict(section))}'`"
    )
