"""Section `policy`: how the model is trained."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError

from rlpretrain.config.base import STRICT, Count, PathText


def _layers(value: Any) -> Any:
    """Refuse what is neither a name nor a list of names, in these words."""
    names = value if isinstance(value, list | tuple) else [value]
    if all(isinstance(name, str) for name in names):
        return value
    raise PydanticCustomError("no_layers", "expected all-linear, or a list of ends of names")


@dataclass(config=STRICT, kw_only=True)
class LoraConfig:
    """Low-rank adapters (arXiv 2106.09685) instead of all weights.

    There is no dropout, because sampled and trained log-probs must agree.
    """

    r: Count = 16
    """Rank."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """The adapter is scaled by alpha / r."""
    target_modules: Annotated[str | tuple[str, ...], BeforeValidator(_layers)] = "all-linear"
    """Layers with an adapter: all-linear (all but the output head), or ends of names (q_proj, v_proj)."""
    use_dora: bool = False
    """Train the length of each weight column beside its direction (DoRA, arXiv 2402.09353)."""
    new_tokens: bool = True
    """Train the embeddings of thought delimiters that the tokenizer lacked."""
    sync: Literal["merged", "adapter"] = "merged"
    """What the engine gets: whole weights with the adapters merged in, or the adapters alone (vllm_local)."""


@dataclass(config=STRICT, kw_only=True)
class FsdpConfig:
    """How FSDP 2 shares weights among ranks."""

    reshard: bool = True
    """Free a layer's weights after its forward and gather them again for its backward (less memory), or keep
    them in between (less communication).
    """
    replicas: Count = 1
    """Groups of ranks that each hold all weights; with 2, each of 16 ranks holds an eighth (HSDP)."""


@dataclass(config=STRICT, kw_only=True)
class PolicyConfig:
    """How the model is trained."""

    backend: str = "auto"
    """auto (DeepSpeed where it is installed, else torch), torch, deepspeed, fsdp, or package.module:Class.
    A policy of your own follows rlpretrain/training/backends/base.py.
    """
    zero_stage: Literal[0, 1, 2, 3] = 0
    """DeepSpeed ZeRO stage."""
    deepspeed_config: PathText | None = None
    """A DeepSpeed JSON file. This library overrides batch sizes and accumulation, and keeps the rest."""
    fsdp: FsdpConfig = field(default_factory=FsdpConfig)
    """How backend fsdp shares weights among ranks."""
    lora: LoraConfig | None = None
    """Train adapters instead of all weights; `{}` takes the defaults."""
    autocast: Literal["none", "bfloat16"] = "none"
    """Run the forward in bfloat16 over float32 weights (backends torch and fsdp)."""
