"""`rlpretrain train CONFIG --dry-run`: checks a configuration and prints its settings, memory and schedule.

It needs no weights and no network: the model is built on the meta device from its config.json, which may
be beside the recipe. Only the servers that the settings name are asked for a connection. For a run of
several processes: WORLD_SIZE=8 rlpretrain train CONFIG --dry-run.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from rlpretrain.config import ConfigError, ModelConfig, PretrainConfig
from rlpretrain.config.io import build, to_dict
from rlpretrain.config.plugins import find
from rlpretrain.evaluation.places import held_out_data, overlaps
from rlpretrain.models.loading import load_tokenizer, only_config
from rlpretrain.objectives import Objective, delimiters, load_objective, parse_section
from rlpretrain.prompts import Delimiters, ensure_delimiters
from rlpretrain.tools import readiness
from rlpretrain.tools.communication import communication
from rlpretrain.tools.memory import GIB, Sizes, memory, peak
from rlpretrain.tools.readiness import missing_tags
from rlpretrain.tools.sizes import count_rows, make_sizes, measure_documents, measure_source
from rlpretrain.tools.timetable import make_timetable
from rlpretrain.tracking.peaks import find_peak
from rlpretrain.training.planning import check_reference, check_settings


def dry_run(config: PretrainConfig, beside: Path) -> int:
    """Print everything about a run of `config`, whose file is in the folder `beside`; 0 if it can run.

    Raises ConfigError for what a run would refuse, as far as that shows without weights and network.
    """
    notes: list[str] = []
    objective = make_objective(config, notes)
    check_settings(config, type(objective), int(os.environ.get("WORLD_SIZE", 1)))
    check_reference(config, objective)
    shape, where = model_shape(config.model, beside)
    passes: dict[str, str] = {}
    if config.data.source is None and not config.data.sources:
        documents = count_rows(config.data, notes)
        longest = measure_documents(config, objective, notes)
    else:
        measured = measure_source(config, objective, notes)
        documents, longest, passes = measured.documents, measured.longest, measured.passes
    sizes = make_sizes(config, objective, shape, notes, longest)
    if config.ntp_data and config.ntp_data.source is not None:
        find(config.ntp_data.source, "ntp_data.source")
    elif config.ntp_data:
        count_rows(config.ntp_data, notes)
    for own in objective.own_data.values():
        if own.source is None:
            count_rows(own, notes)
    for held_out in held_out_data(config).values():
        if held_out.source is None:
            count_rows(held_out, notes)
    notes += overlaps(config)
    if (Path(config.output_dir) / "run.json").exists():
        notes.append(f"{config.output_dir} holds another run: resume it, or choose another output_dir")
    items = memory(config, shape, sizes)
    highest = peak(items)
    rows = [(item.name, f"{item.bytes / GIB:.2f}", item.when, item.formula) for item in items]
    rows.append(("peak", f"{highest / GIB:.2f}", "", "always, and the larger of training and sampling"))
    settings = resolve_settings(config, objective, sizes)
    show_table(
        "Settings that are not defaults, and what auto means here", ("field", "value"), list(settings.items())
    )
    title = (
        f"{type(shape).__name__} of {where}: P = {sizes.parameters:,} parameters. Memory of a rank of "
        f"{sizes.ranks}, at most"
    )
    show_table(title, ("part", "GiB", "when", "formula"), rows)
    received = communication(config, objective, shape, sizes)
    if received:
        rows = [(item.name, f"{item.bytes / GIB:.2f}", item.formula) for item in received]
        rows.append(("all", f"{sum(item.bytes for item in received) / GIB:.2f}", ""))
        show_table("A rank receives in a step, at most", ("part", "GiB", "formula"), rows)
    elif received is None:
        notes.append(f"what ranks send each other is not known for policy.backend {sizes.backend}")
    timetable = make_timetable(config, objective, sizes, documents)
    timetable |= {f"source {name}": words for name, words in passes.items()}
    show_table("Schedule", ("", ""), list(timetable.items()))
    notes += readiness.notes(config, objective.config, sizes, highest, objective.has_positions)
    print(*(f"note: {note}" for note in notes), sep="\n")
    return 0


def show_table(title: str, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*head, title=title, title_justify="left")
    for row in rows:
        table.add_row(*map(str, row))
    Console(width=max(120, Console().width)).print(table)


def model_shape(model: ModelConfig, beside: Path) -> tuple[Any, str]:
    """(the model's Hugging Face configuration, where it was found); ConfigError where there is none.

    It is taken from the folder `model.path`, else from `model.config_beside` (relative to `beside`), else
    from the hub.
    """
    where, revision = model.path, model.revision
    if only_config(where) and not model.from_scratch:
        raise ConfigError(
            f"'{where}' has a configuration but no weights: model.from_scratch: true would initialise them"
        )
    if model.config_beside and not Path(model.path).is_dir():
        where, revision = str(beside / model.config_beside), None
        if not Path(where, "config.json").is_file():
            raise ConfigError(f"model.config_beside: there is no {Path(where, 'config.json')}")
    try:
        return AutoConfig.from_pretrained(
            where, revision=revision, trust_remote_code=model.trust_remote_code
        ), where
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        hint = "offline, model.config_beside may name a folder beside the recipe that holds its config.json"
        raise ConfigError(f"no model configuration in '{where}' ({hint}): {reason}") from error


def make_objective(config: PretrainConfig, notes: list[str]) -> Objective:
    """The objective as a run builds it; a byte tokenizer replaces one that is not on this machine."""
    owner, section = parse_section(config.objective)
    is_local = Path(config.model.tokenizer or config.model.path).is_dir()
    if is_local:
        tokenizer = load_tokenizer(config.model)
    else:
        notes.append(
            "the tokenizer is in no folder here: the words of a template are counted in bytes, an upper bound"
        )
        tokenizer = _make_byte_tokenizer()
    if owner.has_positions:
        notes += missing_tags(tokenizer, Delimiters(section.open, section.close)) if is_local else []
    if (tags := delimiters(config.objective)) is not None:
        ensure_delimiters(tokenizer, None, tags)
    return load_objective(config, tokenizer)


def _make_byte_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: i for i, character in enumerate(alphabet)}
    raw: Any = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))  # its stub has no setters
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw)


def resolve_settings(config: PretrainConfig, objective: Objective, sizes: Sizes) -> dict[str, Any]:
    """Dotted names and values of what the user or the recipe set, with `auto` resolved."""
    needed = {"model": config.model.path, "data": config.data.path, "engine": config.engine.name}
    default_config = to_dict(build(needed))
    default_config["engine"]["name"] = "hf"  # so that another engine is shown
    defaults = _flatten(default_config | {"objective": asdict(type(objective).Config())})
    given = _flatten(to_dict(config) | {"objective": asdict(objective.config)})
    settings = {
        "model.path": config.model.path,
        "data.path": config.data.path,
        "objective.name": config.objective.get("name", "rlp"),
    }
    settings |= {name: v for name, v in given.items() if v is not None and defaults.get(name) != v}
    if config.policy.backend == "auto":
        settings["policy.backend"] = f"auto: {sizes.backend}"
    if config.device == "auto":
        settings["device"] = f"auto: {sizes.device}"
    if config.peak_flops is None and sizes.device.startswith("cuda") and torch.cuda.is_available():
        peak = find_peak(sizes.device)
        settings["peak_flops"] = "not known: set it for perf/mfu" if peak is None else f"auto: {peak:.3g}"
    return settings


def _flatten(values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested values under dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}.{inner}": v for inner, v in _flatten(value).items()}
        else:
            flat[name] = value
    return flat
