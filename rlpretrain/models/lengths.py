"""The longest row that a model takes, and checks that the rows of a run fit, before anything is sampled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlpretrain.config import ConfigError

_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len")


@dataclass(frozen=True, slots=True)
class Limit:
    """The longest row that a model computes as it was trained to."""

    tokens: int
    reason: str
    """Why longer rows do not work."""


@dataclass(frozen=True, slots=True)
class Names:
    """Names, for messages, of the settings that make rows long: those of a run, or of TRL's trainers."""

    documents: str = "data"
    max_length: str = "data.max_length"
    max_thought_tokens: str = "sampling.max_thought_tokens"


def limit_of(model: Any) -> Limit | None:
    """Return the limit of a model or a configuration.

    None if it has none (state-space models, ALiBi without a table).

    A model with `longrope` (Phi-3) has two sets of rotary factors. It uses the long factors for a whole batch
    as soon as one row is longer than the original length. If a thought grows past that length, it and all
    rows of its batch are sampled with one set and scored with the other. No packing layout avoids this, since
    a token's probability depends on the tokens after it. So rows must stay within the original length, unless
    the two sets are equal.
    """
    config = getattr(model, "config", model).get_text_config()
    lengths = [length for name in _NAMES if (length := getattr(config, name, None))]
    original = _original_length(config)
    if original is not None and (not lengths or original < lengths[0]):
        reason = (
            f"the model changes its rotary factors for rows over {original} tokens (longrope), for a whole "
            "batch at once, so that shorter and longer rows cannot be scored together"
        )
        return Limit(original, reason)
    return Limit(lengths[0], f"the model has {lengths[0]} positions") if lengths else None


def _original_length(config: Any) -> int | None:
    """Return the length up to which a longrope model uses its short factors; None for other models."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    by_layer_type = [section for section in rope.values() if isinstance(section, Mapping)]
    lengths = []
    for section in by_layer_type or [rope]:
        rope_type = section.get("rope_type", section.get("type"))
        if rope_type == "longrope" and list(section["short_factor"]) != list(section["long_factor"]):
            length = (
                section.get("original_max_position_embeddings")
                or getattr(config, "original_max_position_embeddings", None)
                or config.max_position_embeddings
            )
            lengths.append(length)
    return min(lengths, default=None)


def check_rows(
    objective: Any,
    longest: int,
    limit: Limit | None,
    names: Names | None = None,
    *,
    thought_tokens: int | None = None,
) -> None:
    """Raise ConfigError if a document of `longest` tokens can make a row that exceeds the model's limit.

    `thought_tokens` is the longest thought; by default that of the objective's settings.
    """
    names = names or Names()
    longest_row = objective.window(longest, thought_tokens).row
    proxy = getattr(objective, "proxy", None)
    proxy_limit = limit_of(proxy.model) if proxy is not None else None
    if proxy_limit is not None and longest > proxy_limit.tokens:
        raise ConfigError(
            f"objective.proxy reads whole documents, and {proxy_limit.reason}, but a document of "
            f"{names.documents} has {longest} tokens: set {names.max_length} to at most "
            f"{proxy_limit.tokens}, or take another proxy"
        )
    if limit is None or longest_row <= limit.tokens:
        return
    longest_document = longest - (longest_row - limit.tokens)
    problem = f"{limit.reason}, but a document of {names.documents} with {longest} tokens"
    if not objective.has_positions and longest_row > longest:
        raise ConfigError(
            f"{problem} may have {longest_row} with its control tokens: set objective.max_length to at most "
            f"{limit.tokens}, or lower {names.max_length}"
        )
    if not objective.has_positions:
        raise ConfigError(f"{problem} is longer: set {names.max_length} to at most {limit.tokens}")
    if longest_document < objective.min_length:
        remedy = f"lower {names.max_thought_tokens}: it leaves no room for a document"
    else:
        remedy = f"set {names.max_length} to at most {longest_document}, or lower {names.max_thought_tokens}"
    raise ConfigError(
        f"{problem} makes rows of up to {longest_row}, with its template, thought, close tag and target: "
        f"{remedy}"
    )


def check_run(
    model: Any, objective: Any, stream: Any, others: Any, held_out: Sequence[Any] | None, *, of: str = ""
) -> None:
    """Raise ConfigError if documents of a run do not fit the model; `of` begins what is said of its limit.

    `stream` has the training documents and `others` those of `ntp_data`; None if there are none.
    """
    limit = limit_of(model)
    limit = limit and Limit(limit.tokens, of + limit.reason)
    if stream is not None:
        check_rows(objective, stream.longest, limit)
        for name, longest in getattr(stream, "longest_only_read", {}).items():
            if limit is not None and longest > limit.tokens:
                raise ConfigError(
                    f"{limit.reason}, but a document of data.sources.{name} has {longest} tokens: set "
                    f"data.sources.{name}.max_length to at most {limit.tokens}"
                )
    if others is not None and limit is not None and others.longest > limit.tokens:
        raise ConfigError(
            f"{limit.reason}, but a document of ntp_data has {others.longest} tokens: set "
            f"ntp_data.max_length to at most {limit.tokens}"
        )
    if held_out:
        check_rows(objective, max(len(d.token_ids) for d in held_out), limit, Names("eval.data"))


def check_engine(objective: Any, longest: int, max_tokens: int | None, names: Names | None = None) -> None:
    """Raise ConfigError if a prompt and all that is sampled after it can exceed the engine's `max_tokens`."""
    if max_tokens is None or not objective.has_positions:
        return
    sampled = objective.window(longest).sampled
    if sampled <= max_tokens:
        return
    names = names or Names()
    raise ConfigError(
        f"the engine takes {max_tokens} tokens (max_model_len), but a document of {names.documents} with "
        f"{longest} tokens makes prompts that reach {sampled} with their thoughts: raise the engine's "
        f"max_model_len, or lower {names.max_length} or {names.max_thought_tokens}"
    )
