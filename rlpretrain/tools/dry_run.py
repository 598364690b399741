"""`rlpretrain train CONFIG --dry-run`: check a configuration, count its model, estimate memory, print the
schedule.

Without weights, and offline but for the servers that the settings name, which are asked whether they take a
connection: the model is built on the meta device from its config.json, which may lie beside the recipe. For a
run of several processes: WORLD_SIZE=8 rlpretrain train CONFIG --dry-run.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from rlpretrain import compat
from rlpretrain.config import ConfigError, DataConfig, ModelConfig, PretrainConfig
from rlpretrain.config.io import build, to_dict
from rlpretrain.config.plugins import find
from rlpretrain.data.data_files import find_files
from rlpretrain.data.document_source import SourceInputs, count_documents
from rlpretrain.data.opening import open_rows, quiet, reads_cells
from rlpretrain.data.stream import open_source
from rlpretrain.data.tokenization import DocumentSplitter
from rlpretrain.models.lengths import check_rows, limit_of
from rlpretrain.models.loading import load_tokenizer, only_config
from rlpretrain.objectives import Objective, load_objective, parse_section
from rlpretrain.prompts import Delimiters, ensure_delimiters
from rlpretrain.tools import readiness
from rlpretrain.tools.memory import GIB, Sizes, count_parameters, memory, peak
from rlpretrain.tools.readiness import missing_tags
from rlpretrain.training.backends import backend_of
from rlpretrain.training.backends.deepspeed import ds_settings
from rlpretrain.training.optim import make_schedule
from rlpretrain.training.planning import check_settings
from rlpretrain.types import Window

SAMPLE = 20_000
"""Rows of a data set that a dry run reads at most."""


def dry_run(config: PretrainConfig, beside: Path) -> int:
    """Print everything about a run of `config`, whose file lies in the folder `beside`; 0 if nothing speaks
    against it.

    Raises ConfigError for whatever a run would refuse and that can be found out without weights and without
    the network.
    """
    notes: list[str] = []
    objective = make_objective(config, notes)
    check_settings(config, type(objective), int(os.environ.get("WORLD_SIZE", 1)))
    shape, where = model_shape(config.model, beside)
    if config.data.source is None:
        documents = count_rows(config.data, notes)
        longest = measure_documents(config, objective, notes)
    else:
        documents, longest = measure_source(config, objective, notes)
    sizes = make_sizes(config, objective, shape, notes, longest)
    if config.ntp_data and config.ntp_data.source is not None:
        find(config.ntp_data.source, "ntp_data.source")
    elif config.ntp_data:
        count_rows(config.ntp_data, notes)
    if config.eval.data and config.data.source is None:
        count_rows(
            replace(config.data, path=config.eval.data, name=None, split="train", streaming=False), notes
        )
    if (Path(config.output_dir) / "run.json").exists():
        notes.append(f"{config.output_dir} holds another run: resume it, or choose another output_dir")
    memories = memory(config, shape, sizes)
    rows = [(m.name, f"{m.bytes / GIB:.2f}", m.when, m.formula) for m in memories]
    rows.append(
        ("peak", f"{peak(memories) / GIB:.2f}", "", "always, and the larger of training and sampling")
    )
    settings = resolved(config, objective, sizes)
    show(
        "Settings that are not defaults, and what auto means here", ("field", "value"), list(settings.items())
    )
    title = (
        f"{type(shape).__name__} of {where}: P = {sizes.parameters:,} parameters. Memory of a rank of "
        f"{sizes.ranks}, at most"
    )
    show(title, ("part", "GiB", "when", "formula"), rows)
    plan = timetable(config, objective, sizes, documents)
    show("Schedule", ("", ""), list(plan.items()))
    notes += readiness.notes(config, objective.config, sizes, peak(memories), objective.has_positions)
    print(*(f"note: {note}" for note in notes), sep="\n")
    return 0


def show(title: str, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table."""
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
    """The objective as a run builds it. A tokenizer that is in no folder here is stood in for by one that
    knows all bytes.
    """
    owner, section = parse_section(config.objective)
    at_hand = Path(config.model.tokenizer or config.model.path).is_dir()
    if at_hand:
        tokenizer = load_tokenizer(config.model)
    else:
        notes.append(
            "the tokenizer is in no folder here: the words of a template are counted in bytes, an upper bound"
        )
        tokenizer = _stand_in()
    if owner.has_positions:
        notes += missing_tags(tokenizer, Delimiters(section.open, section.close)) if at_hand else []
        ensure_delimiters(tokenizer, None, Delimiters(section.open, section.close))
    return load_objective(config, tokenizer)


def _stand_in() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw)


def make_sizes(
    config: PretrainConfig, objective: Objective, shape: Any, notes: list[str], longest: int | None = None
) -> Sizes:
    """Ranks, backend and lengths of the run; ConfigError for settings that cannot work together.

    `longest` is the length of the longest document; where it is not known, `data.max_length` bounds it.
    """
    ranks, policy, backend = int(os.environ.get("WORLD_SIZE", 1)), config.policy, backend_of(config.policy)
    if backend == "deepspeed" and not compat.has_deepspeed():
        notes.append(f"DeepSpeed is not installed here: {compat.INSTALL['deepspeed']}")
    dtype = getattr(torch, config.model.dtype)
    stage = (
        ds_settings(policy, config.optim, dtype)["zero_optimization"]["stage"]
        if backend == "deepspeed"
        else 0
    )
    device = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    longest = config.data.max_length if longest is None else longest
    window = objective.window(longest)
    row, step, piece = window.row, _step_tokens(config, objective, window, longest, ranks), 0
    if objective.has_positions:
        shared, each = _group_tokens(config, objective, window, longest)
        group, piece = shared + config.sampling.thoughts * each, shared + each
        if group > config.token_budget:
            notes.append(
                f"a group at its longest has {group:,} tokens, more than token_budget: there its thoughts "
                "are spread over micro-batches, and the step scores everything once more"
            )
    check_rows(objective, longest, limit_of(shape))
    if objective.has_positions:
        notes += config.engine.memory_notes()
    micro = min(max(config.token_budget, row, piece), step)
    parameters, trained, linear = count_parameters(shape, config.model.trust_remote_code, policy.lora)
    return Sizes(
        parameters, trained, linear, ranks, backend, stage, device, window.prompt, row, micro, longest
    )


def _group_tokens(
    config: PretrainConfig, objective: Objective, window: Window, longest: int
) -> tuple[int, int]:
    """(tokens that the thoughts of a group share, document included; tokens of each thought), at most."""
    target = objective.config.target_length
    arm = (
        objective.config.no_think != "raw" or config.ntp_data is not None
    )  # a row of its own without a thought
    if config.packing == "padded":
        return (1 + arm) * window.row, window.row
    added = window.prompt if objective.template.head else objective.added_tokens
    return longest + added + arm * (window.prompt + target), window.row - window.prompt + 1


def _step_tokens(
    config: PretrainConfig, objective: Objective, window: Window, longest: int, ranks: int
) -> int:
    """Tokens that a step of one rank puts through the model, at most: what bounds a micro-batch beside
    token_budget.
    """
    positions = config.positions_per_step // ranks
    if not objective.has_positions:
        return positions * longest
    shared, each = _group_tokens(config, objective, window, longest)
    return positions * (shared + config.sampling.thoughts * each)


def measure_documents(config: PretrainConfig, objective: Objective, notes: list[str]) -> int | None:
    """Tokens of the longest document, where data and tokenizer are here; None where only `data.max_length`
    bounds it.

    Of more than SAMPLE rows only the first are read; then longer ones may follow, and a note says so.
    """
    data, at_hand = config.data, Path(config.model.tokenizer or config.model.path).is_dir()
    if (
        not at_hand
        or data.streaming
        or config.replay
        or not (Path(data.path).expanduser().exists() or find_files(data))
    ):
        return None
    with quiet():
        rows = open_rows(data)
        splitter = DocumentSplitter(data, objective.tokenizer, objective.min_length, reads_cells(data))
        part = rows.select(range(min(len(rows), SAMPLE)))
        pieces = splitter.split({name: part[name] for name in splitter.columns}, range(len(part)))
    longest = max((len(piece.token_ids) for row in pieces for piece in row), default=0)
    if len(part) < len(rows):
        notes.append(
            f"the longest of the first {SAMPLE:,} documents has {longest:,} tokens; data.max_length, "
            f"{data.max_length:,}, is what bounds the rest, and the estimates"
        )
        return None
    return longest


def measure_source(
    config: PretrainConfig, objective: Objective, notes: list[str]
) -> tuple[int | None, int | None]:
    """Documents of one epoch of `data.source`, and tokens of the longest; None for what is not known.

    ConfigError where the source cannot be opened, and where its length is needed and unknown.
    """
    source_name = str(config.data.source)
    if not Path(config.model.tokenizer or config.model.path).is_dir():
        find(source_name, "data.source")
        notes.append(f"data.source '{source_name}' was not opened: the tokenizer is in no folder here")
        return None, None
    source = open_source(
        SourceInputs(
            config=config.data,
            tokenizer=objective.tokenizer,
            seed=config.seed,
            min_length=objective.min_length,
        )
    )
    documents = count_documents(source)
    if documents is None and config.max_steps is None:
        raise ConfigError("a stream has no known length: give max_steps instead of epochs")
    return documents, source.longest


def count_rows(data: DataConfig, notes: list[str]) -> int | None:
    """Rows of local files; None for a stream, and for what is not here. ConfigError for files that cannot
    be read.
    """
    if "://" in data.path or not (Path(data.path).expanduser().exists() or find_files(data)):
        notes.append(
            f"'{data.path}' was not looked for: it is no file or folder here, so it must be on the hub"
        )
        return None
    with quiet():
        rows = open_rows(data)
    return None if data.streaming else len(rows)


def timetable(
    config: PretrainConfig, objective: Objective, sizes: Sizes, documents: int | None
) -> dict[str, str]:
    """Steps, positions, thoughts, tokens, learning rates and documents, in words."""
    n, s, thinks = config.positions_per_step, config.sampling, objective.has_positions
    each = objective.config.positions_per_document if thinks else 1
    steps, needed = config.max_steps, -(-n // each)
    if steps is None and config.data.streaming:
        raise ConfigError("a stream has no known length: give max_steps instead of epochs")
    if steps is None and documents is not None:
        steps = max(1, -(-int((config.epochs or 1.0) * documents * each) // n))

    def whole(per_step: int) -> str:
        return f"{per_step:,} a step" + (f", {per_step * steps:,} in all" if steps else "")

    out = {
        "steps": f"{steps:,}" if steps else f"unknown offline: {config.epochs:g} epochs",
        "positions": whole(n),
    }
    out["document tokens, at most"] = whole(needed * config.data.max_length)
    if thinks:
        out["thoughts"] = whole(n * s.thoughts)
        out["sampled tokens, at most"] = whole(n * s.thoughts * s.max_thought_tokens)
        out["scored tokens, at most"] = f"{whole(n * s.thoughts * sizes.row)}, in rows of up to {sizes.row:,}"
    if sizes.device == "cpu" or torch.cuda.is_available():
        out["time on this machine, roughly"] = expected_time(config, objective, sizes, steps)
    warm, inner = config.optim.warmup_steps, config.loss.inner_epochs
    rate = make_schedule(config.optim, steps or 1, inner)
    places = sorted({1, max(1, warm), *((max(1, steps // 2), steps) if steps else ())})
    shown = [i for i in places if not steps or i <= steps]
    rates = ", ".join(f"{config.optim.lr * rate(i * inner - 1):.2e} (step {i})" for i in shown)
    out["learning rate"] = f"{rates}; {warm} steps of warm-up, then {config.optim.schedule}"
    out["documents, at least"] = whole(needed)
    if documents is None:
        return out | {"rows there are": "unknown offline"}
    epochs = f": {needed * steps / documents:.3g} epochs" if steps else ""
    return out | {
        "rows there are": f"{documents:,}{epochs}" + "; long ones are split" * (config.data.long == "split")
    }


def expected_time(config: PretrainConfig, objective: Objective, sizes: Sizes, steps: int | None) -> str:
    """How long a step takes, and all of them, by the measured speed of this machine."""
    speed = readiness.measure_speed(sizes.device, getattr(torch, config.model.dtype))
    thoughts = (
        config.positions_per_step // sizes.ranks * config.sampling.thoughts if objective.has_positions else 0
    )
    trained = _step_tokens(config, objective, objective.window(sizes.longest), sizes.longest, sizes.ranks)
    sampled = thoughts * config.sampling.max_thought_tokens
    seconds = readiness.time_of_step(config, sizes, speed, trained, thoughts, sampled)
    total = f", {readiness.in_words(seconds * steps)} in all" if steps else ""
    return f"{readiness.in_words(seconds)} a step{total}, if all is at its longest"


def resolved(config: PretrainConfig, objective: Objective, sizes: Sizes) -> dict[str, Any]:
    """Dotted names and values of what the user or the recipe set, with `auto` resolved."""
    plain = to_dict(
        build({"model": config.model.path, "data": config.data.path, "engine": config.engine.name})
    )
    plain["engine"]["name"] = "hf"
    usual = _flat(plain | {"objective": asdict(type(objective).Config())})
    given = _flat(to_dict(config) | {"objective": asdict(objective.config)})
    out = {
        "model.path": config.model.path,
        "data.path": config.data.path,
        "objective.name": config.objective.get("name", "rlp"),
    }
    out |= {k: v for k, v in given.items() if v is not None and usual.get(k) != v}
    autos = {
        "policy.backend": (config.policy.backend, sizes.backend),
        "device": (config.device, sizes.device),
    }
    return out | {k: f"auto: {found}" for k, (asked, found) in autos.items() if asked == "auto"}


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested values under dotted names."""
    parts = (
        {f"{k}.{n}": x for n, x in _flat(v).items()} if isinstance(v, Mapping) else {k: v}
        for k, v in values.items()
    )
    return {n: x for part in parts for n, x in part.items()}
