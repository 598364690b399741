"""How long a row may be for a model, and whether the rows of a run fit: asked before anything is sampled
or trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlpretrain.config import ConfigError

_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len")


@dataclass(frozen=True, slots=True)
class Limit:
    """The longest row that a model computes as it was trained to, and why it is no longer."""

    tokens: int
    reason: str


@dataclass(frozen=True, slots=True)
class Names:
    """What the settings are called that make rows long: those of a run, or those of a trainer of TRL's."""

    documents: str = "data"
    max_length: str = "data.max_length"
    max_thought_tokens: str = "sampling.max_thought_tokens"


def limit_of(model: Any) -> Limit | None:
    """The limit of a model, or of its configuration; None where it has none (state-space models, ALiBi
    without a table).

    A model with `longrope` (Phi-3) has two sets of rotary factors and takes the long ones for a whole batch
    as soon as one of its rows is longer than the original length. A thought that grows past that length is
    then sampled with one set and scored with the other, and so is every row beside it. No layout repairs
    this, since a token's probability depends on what follows it: rows stay within the original length, unless
    both sets are the same.
    """
    text = getattr(model, "config", model).get_text_config()
    known = [value for name in _NAMES if (value := getattr(text, name, None))]
    short = _original_length(text)
    if short is not None and (not known or short < known[0]):
        reason = (
            f"the model changes its rotary factors for rows over {short} tokens (longrope), for all rows of "
            "a batch at once, so that rows on both sides cannot be scored together"
        )
        return Limit(short, reason)
    return Limit(known[0], f"the model has {known[0]} positions") if known else None


def _original_length(text: Any) -> int | None:
    """The length up to which a longrope model uses its short factors; None where nothing changes with the
    length.
    """
    parameters = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    nested = [part for part in parameters.values() if isinstance(part, Mapping)]  # by kind of layer
    lengths = []
    for part in nested or [parameters]:
        kind = part.get("rope_type", part.get("type"))
        if kind == "longrope" and list(part["short_factor"]) != list(part["long_factor"]):
            at = part.get("original_max_position_embeddings")
            lengths.append(
                at or getattr(text, "original_max_position_embeddings", None) or text.max_position_embeddings
            )
    return min(lengths, default=None)


def check_rows(
    objective: Any,
    longest: int,
    limit: Limit | None,
    names: Names | None = None,
    *,
    thought_tokens: int | None = None,
) -> None:
    """Raise ConfigError if some row that a document of `longest` tokens can make is longer than the model's
    limit.

    `thought_tokens` is the longest thought; by default the one of the objective's setting.
    """
    names, need = names or Names(), objective.window(longest, thought_tokens)
    proxy = getattr(objective, "proxy", None)
    reads = limit_of(proxy.model) if proxy is not None else None
    if reads is not None and longest > reads.tokens:
        raise ConfigError(
            f"objective.proxy reads whole documents, and {reads.reason}, but a document of {names.documents} "
            f"has {longest} tokens: set {names.max_length} to at most {reads.tokens}, or take another proxy"
        )
    if limit is None or need.row <= limit.tokens:
        return
    room = longest - (need.row - limit.tokens)
    said = f"{limit.reason}, but a document of {names.documents} with {longest} tokens"
    if not objective.has_positions:
        raise ConfigError(f"{said} is longer: set {names.max_length} to at most {limit.tokens}")
    if room < objective.min_length:
        remedy = f"lower {names.max_thought_tokens}: it leaves no room for a document"
    else:
        remedy = f"set {names.max_length} to at most {room}, or lower {names.max_thought_tokens}"
    raise ConfigError(
        f"{said} makes rows of up to {need.row}, with its template, thought, close tag and target: {remedy}"
    )


def check_run(model: Any, objective: Any, stream: Any, others: Any, held_out: Sequence[Any] | None) -> None:
    """What a run can know of lengths once its data is read: ConfigError for documents that do not fit the
    model.

    `stream` has the training documents and `others` those of `ntp_data`; None where there are none.
    """
    limit = limit_of(model)
    if stream is not None:
        check_rows(objective, stream.longest, limit)
    if others is not None and limit is not None and others.longest > limit.tokens:
        raise ConfigError(
            f"{limit.reason}, but a document of ntp_data has {others.longest} tokens: set "
            f"ntp_data.max_length to at most {limit.tokens}"
        )
    if held_out:
        check_rows(objective, max(len(d.token_ids) for d in held_out), limit, Names("eval.data"))


def check_engine(objective: Any, longest: int, most: int | None, names: Names | None = None) -> None:
    """Raise ConfigError if some prompt with its thought, and what is said after it, is longer than an
    engine takes (`most`).
    """
    if most is None or not objective.has_positions or (need := objective.window(longest).sampled) <= most:
        return
    names = names or Names()
    raise ConfigError(
        f"the engine takes {most} tokens (max_model_len), but a document of {names.documents} with {longest} "
        f"tokens makes prompts that reach {need} with their thoughts: raise the engine's max_model_len, or "
        f"lower {names.max_length} or {names.max_thought_tokens}"
    )
