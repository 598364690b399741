"""Checkpoint and prompts on disk for TRL's command line, and the checks of both at the first reward."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from rlpretrain import models
from rlpretrain.compat import text_config_of
from rlpretrain.config import ConfigError, ModelConfig
from rlpretrain.files import check_writable
from rlpretrain.objectives import Config, Objective, parse_section, thought_tags
from rlpretrain.prompts import Delimiters
from rlpretrain.trl.data import to_prompt_dataset

SECTION = "objective"
"""Column of prepared prompts: the objective section they were made with, as JSON, the same in every row."""


def end_with_thought(model: Any, close_id: int) -> None:
    """Make the close tag an end of generation. TRL reads these ends from the model."""
    ends = ends_of(model)
    if close_id not in ends:
        model.generation_config.eos_token_id = [*ends, close_id]


def ends_of(model: Any) -> list[int]:
    """The tokens that end a generation of this model."""
    ends = model.generation_config.eos_token_id
    return [ends] if isinstance(ends, int) else list(ends or [])


def prepare(
    config: ModelConfig,
    out: str | Path,
    section: Mapping[str, Any],
    documents: Mapping[str, str],
    *,
    seed: int = 0,
    **settings: Any,
) -> dict[str, Any]:
    """Write the two folders that TRL's scripts read, `out/model` and `out/prompts`.

    The model knows the tags of a thought and ends a generation with the close tag. The prompts are a
    parquet file for each split of `documents` (split → path or hub id). `settings` are those of
    `to_prompt_dataset`.

    Returns the number of prompts of each split, and `added`, the tags that are new to the model. Raises
    ConfigError where `out` holds one of the two already.
    """
    out, section = Path(out), {"name": "rlp", **section}
    existing = [out / name for name in ("model", "prompts") if (out / name).exists()]
    if existing:
        raise ConfigError(f"{existing[0]} exists already: remove it, or choose another folder")
    check_writable(out, "--out")
    if (tags := thought_tags(section)) is None:
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
        with_section = rows.add_column(SECTION, [json.dumps(section)] * len(rows))
        with_section.to_parquet(work / f"{split}.parquet")
    models.save_start(model, tokenizer, out / "model")
    work.replace(out / "prompts")
    return {"added": added} | {split: len(rows) for split, rows in prompts.items()}


def fields_of_prompts(columns: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The fields that objective `name` takes from the section that prompts were prepared with.

    All of them if the section is for the same objective, else those that every objective has (template,
    tags, ...).
    """
    section = json.loads(columns[SECTION][0]) if SECTION in columns else {}
    if section.pop("name", name) == name:
        return section
    return {field.name: section[field.name] for field in fields(Config) if field.name in section}


def check_tags(model: Any, tokenizer: Any, section: Mapping[str, Any]) -> None:
    """Raise ConfigError for a model that lacks the tags of a thought, when it is too late to add them."""
    vocabulary, rows = tokenizer.get_vocab(), text_config_of(model).vocab_size
    tags = thought_tags(section) or Delimiters()
    for tag in (tags.open, tags.close):
        if vocabulary.get(tag, rows) >= rows:
            raise ConfigError(
                f"the checkpoint does not know {tag}, and it cannot be added any more: {_remedy(section)}"
            )


def check_end(model: Any, objective: Objective, section: Mapping[str, Any]) -> None:
    """Raise ConfigError where generations end at the close tag and must not, or must and do not.

    They must not where the objective reads a prediction after the tag.
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
