"""Section `model`: the base checkpoint."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError

from rlpretrain.config.base import STRICT, PathText


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
    compile: bool = False
    """Compile each layer with torch.compile: faster on a GPU, after some seconds (docs/gpu.md)."""
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

    def saved_at(self, path: str) -> ModelConfig:
        """The model that a run with these settings saved in a folder.

        Its weights are there, whole and merged, and so is its tokenizer.
        """
        return replace(
            self,
            path=path,
            tokenizer=None,
            revision=None,
            quantization="none",
            from_scratch=False,
            config_beside=None,
        )


@dataclass(config=STRICT, kw_only=True)
class ReferenceConfig:
    """A second, frozen model that gives log-probs to an objective with need "reference" or "teacher"."""

    path: PathText | None = None
    """Hub id or folder of a checkpoint with the vocabulary of `model`; by default the initial model."""
    tokenizer: PathText | None = None
    """Hub id or folder of its tokenizer; the checkpoint's own by default."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Precision of its weights; by default that of `model`."""
    attn_implementation: str | None = None
    """Attention kernel; by default as for `model`."""
    trust_remote_code: bool = False
    """Run code that comes with the checkpoint. Turn it on only for code that you trust."""
    cache_tokens: Annotated[int, Field(ge=0)] = 2**24
    """Log-probs of `path` to cache where texts are scored again, 4 bytes each, by each rank; 0: none.
    The K likeliest tokens of a teacher are 2 K such numbers. Checkpoints hold the cache, so that a resumed
    run has the same numbers.
    """

    @model_validator(mode="after")
    def _check_path(self) -> ReferenceConfig:
        """Without a path there is no checkpoint that the other fields could describe."""
        given = [name for name in ("tokenizer", "revision", "dtype") if getattr(self, name) is not None]
        if self.path is None and given:
            raise PydanticCustomError(
                "no_reference",
                "'{name}' is set without 'path': without it the initial model is used",
                {"name": given[0]},
            )
        return self
