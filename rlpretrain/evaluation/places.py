"""The positions of held-out documents, and how they are divided into parts that are evaluated one by one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from rlpretrain.config import ConfigError, DataConfig, PretrainConfig
from rlpretrain.data.overlap import shared_files
from rlpretrain.data.stream import read_all
from rlpretrain.objectives import Objective
from rlpretrain.rollouts.drawing import DrawnPosition, document_number, prepare_held_out
from rlpretrain.types import Document


def choose_places(
    objective: Objective,
    documents: Sequence[Document],
    entropies: Sequence[Any],
    *,
    most: int = 1,
    seed: int = 0,
) -> list[DrawnPosition]:
    """The first `most` of the objective's positions in each document, with the seeds of their thoughts.

    They depend only on `seed` and the document's id. Raises ConfigError if no document has a position.
    """
    places = []
    for document, of_document in zip(documents, entropies, strict=True):
        rng = np.random.default_rng((seed, document_number(document.id)))
        for position in objective.positions(document, rng, of_document)[:most]:
            places.append(DrawnPosition(document, position, int(rng.integers(2**62)), None))
    if not places:
        raise ConfigError(
            f"none of the {len(documents)} held-out documents has a position for this objective"
        )
    return places


def in_parts(places: Sequence[DrawnPosition], size: int) -> Iterator[list[int]]:
    """The indices of `places` in parts of about `size`; the positions of a document stay together."""
    part: list[int] = []
    for i, place in enumerate(places):
        if len(part) >= size and place.document.id != places[i - 1].document.id:
            yield part
            part = []
        part.append(i)
    yield part


def held_out_data(config: PretrainConfig) -> dict[str, DataConfig]:
    """Where held-out documents come from: a section `data` for each source in `eval.data`.

    A single file has the name "". It is read with the fields of the section `data`, the file of a source with
    the fields of that source.
    """
    data, given = config.data, config.eval.data
    if not given:
        return {}
    if isinstance(given, dict) and (unknown := sorted(given.keys() - data.sources.keys())):
        known = ", ".join(data.sources) or "there are none"
        raise ConfigError(f"eval.data names '{unknown[0]}', which is none of data.sources ({known})")
    files = given if isinstance(given, dict) else {"": given}
    sections = {}
    for name, path in files.items():
        texts = data.sources[name].texts() if name else replace(data, sources={}, mixing=None, path=path)
        sections[name] = replace(
            texts, path=path, name=None, split="train", streaming=False, score_column=None
        )
    return sections


def overlaps(config: PretrainConfig) -> list[str]:
    """A sentence for each held-out file that a run is trained on."""
    if config.replay is not None:
        return []
    training = {f"data.sources.{name}": source.texts() for name, source in config.data.sources.items()}
    training = training or {"data": config.data}
    if config.ntp_data is not None:
        training["ntp_data"] = config.ntp_data
    held = {f"eval.data.{name}".rstrip("."): data for name, data in held_out_data(config).items()}
    return list(shared_files(training, held)) if held else []


def held_out(
    config: PretrainConfig, tokenizer: Any, objective: Objective, ranks: int
) -> list[Document] | None:
    """The documents of `eval.data`; ConfigError if they have too few positions to be evaluated.

    `eval.documents` of each source; the documents of a source have its name as their `stream`. Positions are
    needed in sources to think in only.
    """
    sections = held_out_data(config)
    if not sections:
        return None
    documents, usable = [], []
    for name, data in sections.items():
        read = read_all(data, tokenizer, limit=config.eval.documents, seed=0)
        if name:
            read = [replace(document, id=f"{name}/{document.id}", stream=name) for document in read]
        documents += read
        if objective.has_positions and only_read(config, name):
            continue
        of_source = [_is_usable(objective, document, config.seed) for document in read]
        if sum(of_source) < 2 * ranks:
            raise ConfigError(
                f"eval.data {data.path}: {sum(of_source)} of {len(read)} documents can be used (have a "
                "position); evaluation needs 2 for each rank"
            )
        usable += of_source
    if not usable:
        raise ConfigError("eval.data has only sources with use: read: add one to think in")
    if min(sum(usable[rank::ranks]) for rank in range(ranks)) < 2:
        raise ConfigError(
            f"eval.data: one of {ranks} ranks has fewer than 2 documents with a position: raise "
            "eval.documents"
        )
    return documents


def only_read(config: PretrainConfig, name: str) -> bool:
    """Whether a named source is only read; never without a name."""
    return name in config.data.sources and config.data.sources[name].use == "read"


def _is_usable(objective: Objective, document: Document, seed: int) -> bool:
    """Whether the prepared document has a position; entropies are not known yet, so they count as 0."""
    prepared = prepare_held_out(objective, document, seed)
    if prepared is None:
        return False
    if not objective.has_positions:
        return True
    entropies = torch.zeros(len(prepared.token_ids))
    return bool(objective.positions(prepared, np.random.default_rng(seed), entropies))
