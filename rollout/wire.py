"""What the rollout service accepts: the bodies of its routes, and its limits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, Strict

from rollout.types import Position, Prompt, SamplingParams, sane_temperature


def _not_boolean(value: Any) -> Any:
    """Refuse true and false, which pydantic would read as 1 and 0."""
    if isinstance(value, bool):
        raise ValueError("a number is due, not true or false")
    return value


Number = BeforeValidator(_not_boolean)
"""In the annotation of every field that is a number."""
TokenId = Annotated[int, Strict(), Field(ge=0, le=2**31 - 1)]
"""Strict, which refuses booleans too and is fast for the many ids of a body."""
Count = Annotated[int, Field(ge=1), Number]
Seed = Annotated[int, Field(ge=0, le=2**62), Number]
"""Each thought of a request gets its own seed, which must fit 63 bits."""
Temperature = Annotated[
    float, Field(ge=0, le=100, allow_inf_nan=False), AfterValidator(sane_temperature), Number
]
Share = Annotated[float, Field(gt=0, le=1), Number]
Ids = Annotated[list[TokenId], Field(fail_fast=True)]
"""Fails at the first error: all errors of a large bad body would take more memory than the body."""
Short = Annotated[str, Field(min_length=1, max_length=256)]


@dataclass(frozen=True)
class Limits:
    """What one request, and all together, may take; above a limit the answer is a 4xx that names it."""

    body_bytes: int = 8 << 20
    """Largest request body: 413."""
    held_bytes: int = 128 << 20
    """Bytes of all bodies in memory: 429, with Retry-After."""
    prompts: int = 1024
    """Most prompts of one request: 400."""
    n: int = 1024
    """Most thoughts for one prompt: 400."""
    thoughts: int = 16384
    """Most thoughts of one request: 400."""
    requests: int = 256
    """Most sampling requests at a time, waiting ones included: 429, with Retry-After."""
    body_s: float = 30.0
    """Seconds between two parts of a body: 408."""
    request_s: float = 600.0
    """Seconds that sampling may take, or wait while the service is paused: 504."""


class Body(BaseModel):
    """A request body: unknown fields are refused by name."""

    model_config = ConfigDict(extra="forbid")


class Completion(Body):
    """`POST /v1/completions`: vLLM's fields, as far as thoughts need them; prompts are token ids or text."""

    model: str | None = None
    prompt: Ids | Annotated[list[Ids], Field(fail_fast=True)] | Annotated[str, Field(min_length=1)]
    n: Count = 1
    max_tokens: Count = 16
    temperature: Temperature = 1.0
    top_p: Share = 1.0
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1), Number] = 0
    seed: Seed = 0
    stop: list[Short] | Short | None = Field(default=None, max_length=64)
    stop_token_ids: Ids = Field(default_factory=list, max_length=1024)
    ignore_eos: bool = False
    logprobs: Annotated[Literal[0] | None, Number] = None
    return_token_ids: bool = False
    skip_special_tokens: bool = True
    logit_bias: dict[Annotated[int, Field(ge=0, le=2**31 - 1)], Literal[-100]] | None = Field(
        default=None, max_length=1024
    )
    """Only to ban tokens: a bias of -100, which removes them here, while vLLM adds it."""
    stream: Literal[False] = False

    def prompts(self, encode: Callable[[str], Sequence[int]] | None) -> list[Prompt]:
        """The prompts with their stop conditions; ValueError for text if there is no tokenizer."""
        given: Any  # a list of lists of token ids
        if isinstance(self.prompt, str):
            if encode is None:
                raise ValueError("prompt is text, and this service has no tokenizer: send token ids")
            given = [encode(self.prompt)]
        else:
            given = self.prompt if self.prompt and isinstance(self.prompt[0], list) else [self.prompt]
        strings = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        stop_ids = tuple(self.stop_token_ids)
        return [Prompt(tuple(ids), stop_ids, stop_strings=strings) for ids in given]

    def params(self, eos_ids: Sequence[int]) -> SamplingParams:
        """The library's sampling parameters."""
        eos = () if self.ignore_eos else tuple(eos_ids)
        banned = tuple(self.logit_bias or ())
        return SamplingParams(self.max_tokens, self.temperature, self.top_p, max(0, self.top_k), eos, banned)


class Params(Body):
    """`SamplingParams`, with bounds."""

    max_thought_tokens: Count
    temperature: Temperature = 1.0
    top_p: Share = 1.0
    top_k: Annotated[int, Field(ge=0, le=2**31 - 1), Number] = 0
    eos_ids: Ids = Field(default_factory=list, max_length=1024)
    banned_ids: Ids = Field(default_factory=list, max_length=1024)

    def params(self) -> SamplingParams:
        """The library's `SamplingParams`."""
        return SamplingParams(
            self.max_thought_tokens,
            self.temperature,
            self.top_p,
            self.top_k,
            tuple(self.eos_ids),
            tuple(self.banned_ids),
        )


class PromptBody(Body):
    """`Prompt`."""

    token_ids: Ids
    stop_ids: Ids = Field(default_factory=list, max_length=1024)
    close_ids: Ids = Field(default_factory=list, max_length=1024)
    join_ids: Ids = Field(default_factory=list, max_length=1024)
    stop_strings: list[Short] = Field(default_factory=list, max_length=64)

    def prompt(self) -> Prompt:
        """The library's `Prompt`."""
        return Prompt(
            tuple(self.token_ids),
            tuple(self.stop_ids),
            tuple(self.close_ids),
            tuple(self.join_ids),
            tuple(self.stop_strings),
        )


class PositionBody(Body):
    """`Position`."""

    document_id: Annotated[str, Field(max_length=1024)]
    index: Annotated[int, Field(ge=0, le=2**62), Number]
    context_ids: Ids = Field(default_factory=list)
    target_ids: Ids = Field(default_factory=list)
    suffix_ids: Ids = Field(default_factory=list)

    def position(self) -> Position:
        """The library's `Position`."""
        return Position(
            self.document_id,
            self.index,
            tuple(self.context_ids),
            tuple(self.target_ids),
            tuple(self.suffix_ids),
        )


class Rollout(Body):
    """`POST /rollout`: prompts in the library's form, optionally with their positions."""

    prompts: Annotated[list[PromptBody], Field(fail_fast=True)]
    params: Params
    n: Count = 1
    seeds: Annotated[list[Seed], Field(fail_fast=True)]
    positions: Annotated[list[PositionBody], Field(fail_fast=True)] | None = None


class ReloadWhere(Body):
    """A folder or file under the service's weights folder."""

    weights_path: Annotated[str, Field(min_length=1, max_length=4096)]


class Reload(Body):
    """`POST /collective_rpc`: of vLLM's remote calls, only the one that loads weights."""

    method: Literal["reload_weights"]
    kwargs: ReloadWhere


class Mark(Body):
    """`POST /update_weight_version`: the trainer's name for the present weights."""

    new_version: Annotated[str, Field(max_length=4096)]
