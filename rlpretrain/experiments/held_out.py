"""The held-out documents of an experiment, from one place or from several named sources."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rlpretrain.config import DataConfig
from rlpretrain.data.stream import read_all
from rlpretrain.types import Document


def read_held_out(data: DataConfig, tokenizer: Any, *, limit: int, seed: int) -> list[Document]:
    """A random sample of `limit` documents, of each source where `data` has several.

    The id of a source's document begins with its name: "web/17".
    """
    if not data.sources:
        return read_all(data, tokenizer, limit=limit, seed=seed)
    documents: list[Document] = []
    for name, source in data.sources.items():
        read = read_all(source.texts(), tokenizer, limit=limit, seed=seed)
        documents += [replace(document, id=f"{name}/{document.id}", stream=name) for document in read]
    return documents
