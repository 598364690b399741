"""The sizes of a planned run: ranks, backend, tokens of rows, groups, micro-batches and steps."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rlpretrain import compat
from rlpretrain.config import ConfigError, DataConfig, PretrainConfig
from rlpretrain.config.plugins import find
from rlpretrain.data.data_files import find_files
from rlpretrain.data.document_source import SourceInputs, count_documents
from rlpretrain.data.mixture import Mixture
from rlpretrain.data.opening import open_rows, quiet, reads_cells
from rlpretrain.data.stream import open_source
from rlpretrain.data.tokenization import DocumentSplitter
from rlpretrain.models.lengths import Limit, check_rows, limit_of
from rlpretrain.objectives import Objective, delimiters
from rlpretrain.scoring.reference_model import (
    check_vocabulary,
    is_local,
    reference_model_config,
    reference_shape,
)
from rlpretrain.tools.memory import Sizes
from rlpretrain.tools.parameter_counts import count_by_shape
from rlpretrain.tools.passes import count_passes
from rlpretrain.training.backends import backend_of
from rlpretrain.training.backends.deepspeed import ds_settings
from rlpretrain.types import Window

SAMPLE = 20_000
"""Rows of a data set that a dry run reads at most."""


@dataclass(frozen=True, slots=True)
class GroupTokens:
    """The most tokens that a group puts through the model."""

    shared: int
    """Read once for all thoughts, the document included."""
    per_thought: int


@dataclass(frozen=True, slots=True)
class MeasuredSource:
    """What a document source says of itself; None where it is not known."""

    documents: int | None
    """Documents of one epoch."""
    longest: int | None
    """Tokens of the longest."""
    passes: dict[str, str] = field(default_factory=dict)
    """Of each of several sources, how often the run reads it."""


def make_sizes(
    config: PretrainConfig, objective: Objective, shape: Any, notes: list[str], longest: int | None = None
) -> Sizes:
    """Ranks, backend and lengths of the run; ConfigError for settings that cannot work together.

    `longest` is the length of the longest document; where it is not known, `data.max_length` bounds it.
    """
    ranks, policy, backend = int(os.environ.get("WORLD_SIZE", 1)), config.policy, backend_of(config.policy)
    if backend == "deepspeed" and not compat.has_deepspeed():
        notes.append(f"DeepSpeed is not installed here: {compat.INSTALL['deepspeed']}")
    stage = 3 if backend == "fsdp" else 0
    if backend == "deepspeed":
        settings = ds_settings(policy, config.optim, getattr(torch, config.model.dtype))
        stage = settings["zero_optimization"]["stage"]
    device = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    longest = config.data.longest if longest is None else longest
    window = objective.window(longest)
    step = count_step_tokens(config, objective, longest, ranks)
    smallest_piece = 0  # that a micro-batch must hold
    if objective.has_positions:
        group = _count_group_tokens(config, objective, window, longest)
        smallest_piece = group.shared + group.per_thought
        whole_group = group.shared + config.sampling.thoughts * group.per_thought
        if whole_group > config.token_budget:
            notes.append(
                f"the longest group has {whole_group:,} tokens, more than token_budget: its thoughts are "
                "spread over micro-batches, and the step scores everything once more"
            )
    check_rows(objective, longest, limit_of(shape))
    if objective.has_positions:
        notes += config.engine.memory_notes()
    micro = min(max(config.token_budget, window.row, smallest_piece), step)
    parameters = count_by_shape(shape, config.model.trust_remote_code, policy.lora)
    reference = _count_reference(config, objective, longest, parameters.all, notes)
    return Sizes(
        parameters=parameters.all,
        trained=parameters.trained,
        linear=parameters.linear,
        ranks=ranks,
        backend=backend,
        stage=stage,
        device=device,
        prompt=window.prompt,
        row=window.row,
        micro=micro,
        longest=longest,
        reference=reference,
        own=objective.own_parameters(shape.get_text_config().vocab_size),
        needs=frozenset(objective.needs),
    )


def _count_reference(
    config: PretrainConfig, objective: Objective, longest: int, default: int, notes: list[str]
) -> int:
    """Parameters of the model of `reference.path`: 0 without one, `default` where it is not on this machine.

    ConfigError where it cannot score the documents.
    """
    if config.reference.path is None:
        return 0
    other = reference_model_config(config)
    if not is_local(other):
        notes.append(
            f"'{other.path}' of reference.path is no folder here: it is taken to be as large as model"
        )
        return default
    if is_local(config.model) and not config.model.from_scratch:
        check_vocabulary(config, delimiters(config.objective))
    shape = reference_shape(other)
    limit = limit_of(shape)
    check_rows(objective, longest, limit and Limit(limit.tokens, f"reference.path: {limit.reason}"))
    return count_by_shape(shape, other.trust_remote_code).all


def _count_group_tokens(
    config: PretrainConfig, objective: Objective, window: Window, longest: int
) -> GroupTokens:
    target = objective.config.target_length
    # Whether the arm without a thought is a row of its own.
    only_thinks = any(not source.next_token for source in config.data.sources.values())
    own_arm = objective.config.no_think != "raw" or config.ntp_data is not None or only_thinks
    if config.packing == "padded":
        return GroupTokens((1 + own_arm) * window.row, window.row)
    added = window.prompt if objective.template.head else objective.added_tokens
    shared = longest + added + own_arm * (window.prompt + target)
    return GroupTokens(shared, window.row - window.prompt + 1)


def count_step_tokens(config: PretrainConfig, objective: Objective, longest: int, ranks: int) -> int:
    """The most tokens that a step of one rank puts through the model. They bound a micro-batch, too."""
    positions = config.positions_per_step // ranks
    if not objective.has_positions:
        return positions * objective.window(longest).row
    group = _count_group_tokens(config, objective, objective.window(longest), longest)
    return positions * (group.shared + config.sampling.thoughts * group.per_thought)


def measure_documents(config: PretrainConfig, objective: Objective, notes: list[str]) -> int | None:
    """Tokens of the longest document; None where only `data.max_length` bounds it.

    That is so where data or tokenizer are not on this machine, and for more than SAMPLE rows: only the
    first are read, longer ones may follow, and a note says so.
    """
    data = config.data
    has_tokenizer = Path(config.model.tokenizer or config.model.path).is_dir()
    if not has_tokenizer or data.streaming or config.replay or not _is_local(data):
        return None
    with quiet():
        rows: Any = open_rows(data)  # a Dataset, since `data` is no stream
        splitter = DocumentSplitter(data, objective.tokenizer, objective.min_length, reads_cells(data))
        part = rows.select(range(min(len(rows), SAMPLE)))
        pieces = splitter.split({name: part[name] for name in splitter.columns}, range(len(part)))
    longest = max((len(piece.token_ids) for row in pieces for piece in row), default=0)
    if len(part) < len(rows):
        notes.append(
            f"the longest of the first {SAMPLE:,} documents has {longest:,} tokens; the rest, and the "
            f"estimates, are bounded by data.max_length, {data.max_length:,}"
        )
        return None
    return longest


def measure_source(config: PretrainConfig, objective: Objective, notes: list[str]) -> MeasuredSource:
    """Open `data.source` or `data.sources` and ask for the number and lengths of documents.

    ConfigError where a source cannot be opened, and where its length is needed and unknown.
    """
    if not Path(config.model.tokenizer or config.model.path).is_dir():
        names = {"data.source": config.data.source}
        names |= {
            f"data.sources.{name}.source": source.source for name, source in config.data.sources.items()
        }
        for setting, name in names.items():
            if name is not None:
                find(name, setting)
        notes.append("the document sources were not opened: the tokenizer is in no folder here")
        return MeasuredSource(None, None)
    source = open_source(
        SourceInputs(
            config=config.data,
            tokenizer=objective.tokenizer,
            seed=config.seed,
            min_length=objective.min_length,
            thinks=objective.has_positions,
        )
    )
    documents = count_documents(source)
    if documents is None and config.max_steps is None:
        raise ConfigError("a stream has no known length: give max_steps instead of epochs")
    passes = count_passes(source, config, objective) if isinstance(source, Mixture) else {}
    return MeasuredSource(documents, source.longest, passes)


def count_rows(data: DataConfig, notes: list[str]) -> int | None:
    """Rows of local files; None for a stream, and for data that is not on this machine.

    ConfigError for files that cannot be read.
    """
    if "://" in data.path or not _is_local(data):
        notes.append(
            f"'{data.path}' was not looked for: it is no file or folder here, so it must be on the hub"
        )
        return None
    with quiet():
        rows: Any = open_rows(data)
    return None if data.streaming else len(rows)


def _is_local(data: DataConfig) -> bool:
    return Path(data.path).expanduser().exists() or bool(find_files(data))
