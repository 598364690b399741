"""Sections `model` and `data`: the base checkpoint and the documents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field as _field
from typing import Any, Literal

from pydantic import model_validator
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError

from rlpretrain.config.base import STRICT, Count, PathText


@dataclass(config=STRICT, kw_only=True)
class ModelConfig:
    """The base checkpoint."""

    path: PathText
    """Hub id or folder of a Hugging Face causal language model."""
    tokenizer: PathText | None = None
    """Hub id or folder of the tokenizer; the model's own by default."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the trained weights."""
    attn_implementation: str | None = None
    """Attention kernel as transformers names it (sdpa, eager, flash_attention_2, ...); by default one that
    computes all of the model's attention.
    """
    trust_remote_code: bool = False
    """Run code that comes with the checkpoint. Turn it on only for code that you trust."""
    gradient_checkpointing: bool = False
    """Recompute activations in backward to save memory: only the inputs of layers are kept."""
    activation_offloading: bool = False
    """Keep these inputs in CPU memory; needs `gradient_checkpointing`."""
    quantization: Literal["none", "4bit", "8bit"] = "none"
    """Linear layers in four (nf4) or eight bits with bitsandbytes, for QLoRA (arXiv 2305.14314)."""
    from_scratch: bool = False
    """Use only the configuration of `path` and initialise the weights from the seed."""
    config_beside: PathText | None = None
    """Folder with the model's config.json, relative to the YAML file; `--dry-run` reads it if `path` is on
    the hub.
    """

    @model_validator(mode="after")
    def _check_offloading(self) -> ModelConfig:
        """What is offloaded are the inputs of recomputed layers."""
        if self.activation_offloading and not self.gradient_checkpointing:
            raise PydanticCustomError(
                "no_checkpointing", "'activation_offloading' needs 'gradient_checkpointing: true'"
            )
        return self


@dataclass(config=STRICT, kw_only=True)
class DataConfig:
    """Where documents come from: any file or hub dataset that `datasets` reads, or a source of your own."""

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
    def _check_source(cls, given: Any) -> Any:
        """`path` may be missing, and `options` given, only with a `source`."""
        values = given if isinstance(given, Mapping) else given.kwargs or {}
        if values.get("source") is None and "path" not in values:
            raise PydanticCustomError("no_documents", "'path' is required, or a 'source' of your own")
        if values.get("source") is None and values.get("options"):
            raise PydanticCustomError("no_source", "'options' are those of a 'source', which is not set")
        return given
